//! Tools of VMs: which there are, where they come from, and the layers that they become.

mod build;
mod catalogue;
mod config;
mod error;
mod tools;
mod version;

pub use build::{
    BuildArtefact, BuildError, BuildJob, Builder, LAYOUT_FAILED, LogSink, SIZE_PREFIX,
    STAGE_PREFIX, VERIFY_FAILED,
};
pub use catalogue::{Catalogue, Recipe};
pub use config::{BaseImage, Endpoints, ToolsConfig};
pub use error::ToolError;
pub use tools::{LockedTool, ReadyLayer, ToolEvent, ToolVersion, ToolVersions, Tools, ToolsPruned};
