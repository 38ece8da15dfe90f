//! Tools of VMs: which there are, where they come from, and the layers that they become.

mod build;
mod catalogue;
mod checksum;
mod config;
mod error;
mod fetch;
mod http;
mod lock;
mod mirror;
mod program;
mod recipe;
mod sources;
mod store;
mod tools;
mod version;

pub use build::{
    BuildArtefact, BuildError, BuildJob, Builder, LAYOUT_FAILED, LogSink, SIZE_PREFIX,
    STAGE_PREFIX, VERIFY_FAILED,
};
pub use catalogue::Catalogue;
pub use config::{BaseImage, Endpoints, ToolsConfig};
pub use error::ToolError;
pub use recipe::Recipe;
pub use tools::{LockedTool, ReadyLayer, ToolEvent, ToolVersion, ToolVersions, Tools, ToolsPruned};
