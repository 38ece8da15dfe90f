//! What a `Run` comes to in this guest: user, environment, directory, candidates for the program.

use std::ffi::CString;

use aether_protocol::{EnvVar, ErrorCode, Run};

use crate::error::Fail;
use crate::users::{self, User};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command with everything that is needed between `clone` and `exec`.
#[derive(Debug)]
pub(super) struct Command {
    pub(super) user: User,
    /// What to execute, in the order to try.
    pub(super) programs: Vec<CString>,
    pub(super) args: Vec<CString>,
    pub(super) env: Vec<CString>,
    pub(super) directory: Directory,
}

#[derive(Debug)]
pub(super) enum Directory {
    /// Asked for; it is an error if it is not there.
    Named(CString),
    /// The home; `/` if it is not there.
    Home(CString),
}

impl Command {
    pub(super) fn prepare(run: &Run, guest_env: Vec<EnvVar>) -> Result<Self, Fail> {
        let user = users::find(run.user.as_deref())?;
        let vars = environment(run, &user, guest_env);
        let path = vars.iter().find(|var| var.name == "PATH").map_or("", |var| &var.value);
        let programs = candidates(&run.command, path)?;
        let words = std::iter::once(&run.command).chain(&run.args);
        let args = words.map(|word| text(word)).collect::<Result<_, _>>()?;
        let env = vars.iter().map(|var| text(&format!("{}={}", var.name, var.value)));
        let env = env.collect::<Result<_, _>>()?;
        let directory = match &run.cwd {
            Some(cwd) => Directory::Named(text(cwd)?),
            None => Directory::Home(text(&user.home)?),
        };
        Ok(Self { user, programs, args, env, directory })
    }
}

fn text(value: &str) -> Result<CString, Fail> {
    CString::new(value)
        .map_err(|_| Fail::new(ErrorCode::InvalidArgument, "a text has a zero byte in it"))
}

/// Later wins: the agent's defaults, the guest's, the request's.
fn environment(run: &Run, user: &User, guest_env: Vec<EnvVar>) -> Vec<EnvVar> {
    let mut vars = vec![
        EnvVar::new("PATH", DEFAULT_PATH),
        EnvVar::new("HOME", &user.home),
        EnvVar::new("USER", &user.name),
        EnvVar::new("LOGNAME", &user.name),
        EnvVar::new("SHELL", &user.shell),
        EnvVar::new("LANG", "C.UTF-8"),
    ];
    if run.tty.is_some() {
        vars.push(EnvVar::new("TERM", "xterm-256color"));
    }
    for var in guest_env.into_iter().chain(run.env.iter().cloned()) {
        match vars.iter_mut().find(|known| known.name == var.name) {
            Some(known) => known.value = var.value,
            None => vars.push(var),
        }
    }
    vars
}

fn candidates(command: &str, path: &str) -> Result<Vec<CString>, Fail> {
    if command.contains('/') {
        return Ok(vec![text(command)?]);
    }
    // An empty entry is the current directory, as in a shell.
    let in_directory = |directory: &str| match directory {
        "" => text(&format!("./{command}")),
        _ => text(&format!("{directory}/{command}")),
    };
    path.split(':').map(in_directory).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(command: &Command, name: &str) -> Option<String> {
        let vars = command.env.iter().filter_map(|var| var.to_str().ok()?.split_once('='));
        vars.filter(|(key, _)| *key == name).map(|(_, value)| value.to_owned()).next_back()
    }

    #[test]
    fn request_overrides_guest_overrides_default() {
        let guest = vec![EnvVar::new("LANG", "guest"), EnvVar::new("A", "guest")];
        let env = vec![EnvVar::new("A", "request"), EnvVar::new("PATH", "/x:")];
        let run = Run { command: "tool".into(), env, ..Run::default() };
        let command = Command::prepare(&run, guest).unwrap();
        assert_eq!(value(&command, "LANG").as_deref(), Some("guest"));
        assert_eq!(value(&command, "A").as_deref(), Some("request"));
        assert_eq!(value(&command, "HOME").as_deref(), Some("/root"));
        assert_eq!(value(&command, "TERM"), None);
        assert_eq!(command.programs, [c"/x/tool".to_owned(), c"./tool".to_owned()]);
    }
}
