//! `aether project`.

use clap::Subcommand;

const EXAMPLES: &str = "\
Examples:
  aether project create build
  aether key create ci --project build --role operator
  aether project list
  aether project delete build

What is of one project does not exist for another; a key is of one project. Projects are for admins of
the project `default`.";

#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum Project {
    /// Make a project; `aether key create --project` gives the first key to it
    Create {
        /// 1 to 63 of a-z 0-9 - _ . with a letter or a digit first
        name: String,
    },
    /// List projects, newest first
    #[command(visible_alias = "ls")]
    List,
    Get {
        /// An id or a name
        project: String,
    },
    /// Delete a project that has nothing in it any more, and its keys
    #[command(visible_alias = "rm")]
    Delete {
        /// An id or a name
        project: String,
    },
}
