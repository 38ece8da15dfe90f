//! Limits on requests, checked by the host before it sends and by the guest before it acts.

use crate::limits::{
    ARGS_BYTES_MAX, ENTROPY_BYTES_MAX, ENV_BYTES_MAX, LAYER_ALIGN_BYTES, LAYER_NAME_BYTES_MAX,
    LAYERS_DEVICE_BYTES, LAYERS_MAX, NETWORK_ITEMS_MAX, PATH_BYTES_MAX, RUN_ID_BYTES_MAX,
    USER_BYTES_MAX,
};
use crate::message::{Configure, EnvVar, ErrorCode, Layer, Refused, RequestBody, Run};
use crate::token::TOKEN_BYTES;

/// A request that no guest would take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("{what} has {actual} bytes, past the limit of {limit}")]
    TooLarge { what: &'static str, actual: usize, limit: usize },
    #[error("{what} has {actual} entries, past the limit of {limit}")]
    TooMany { what: &'static str, actual: usize, limit: usize },
    #[error("{what} is empty")]
    Empty { what: &'static str },
    #[error("{what} has a zero byte in it")]
    ZeroByte { what: &'static str },
    #[error("path {path:?} is not absolute")]
    RelativePath { path: String },
    #[error("{name:?} cannot name an environment variable")]
    EnvName { name: String },
    #[error("{what} has {actual} bytes where {wanted} are wanted")]
    Length { what: &'static str, actual: usize, wanted: usize },
    #[error("layer {name:?} is not at a place of its own on the layers device")]
    LayerPlace { name: String },
    #[error("the request is unknown")]
    Unknown,
}

impl RequestError {
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::TooLarge { .. } | Self::TooMany { .. } => ErrorCode::TooLarge,
            Self::Empty { .. }
            | Self::ZeroByte { .. }
            | Self::EnvName { .. }
            | Self::LayerPlace { .. }
            | Self::Length { .. } => ErrorCode::InvalidArgument,
            Self::RelativePath { .. } => ErrorCode::InvalidPath,
            Self::Unknown => ErrorCode::UnknownRequest,
        }
    }
}

impl From<RequestError> for Refused {
    fn from(error: RequestError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// Checks everything that can be checked without a guest.
pub fn check_request(request: &RequestBody) -> Result<(), RequestError> {
    match request {
        RequestBody::Ping(_) | RequestBody::Shutdown(_) | RequestBody::ListRuns(_) => Ok(()),
        RequestBody::Configure(configure) => check_configure(configure),
        RequestBody::Run(run) => check_run(run),
        RequestBody::Attach(attach) => check_run_id(&attach.run_id),
        RequestBody::Forget(forget) => check_run_id(&forget.run_id),
        RequestBody::ReadFile(read) => check_path(&read.path, read.user.as_deref()),
        RequestBody::WriteFile(write) => check_path(&write.path, write.user.as_deref()),
        RequestBody::List(list) => check_path(&list.path, list.user.as_deref()),
        RequestBody::Stat(stat) => check_path(&stat.path, stat.user.as_deref()),
        RequestBody::Mkdir(mkdir) => check_path(&mkdir.path, mkdir.user.as_deref()),
        RequestBody::Remove(remove) => check_path(&remove.path, remove.user.as_deref()),
        RequestBody::Move(files) => {
            check_path(&files.from, files.user.as_deref())?;
            check_path(&files.to, None)
        }
    }
}

fn check_run(run: &Run) -> Result<(), RequestError> {
    if run.command.is_empty() {
        return Err(RequestError::Empty { what: "command" });
    }
    let words = || std::iter::once(&run.command).chain(&run.args);
    at_most("argument list", words().map(|word| word.len() + 1).sum(), ARGS_BYTES_MAX)?;
    if words().any(|word| word.contains('\0')) {
        return Err(RequestError::ZeroByte { what: "argument list" });
    }
    check_env(&run.env)?;
    if run.detached || !run.run_id.is_empty() {
        check_run_id(&run.run_id)?;
    }
    if let Some(cwd) = &run.cwd {
        check_path(cwd, None)?;
    }
    check_user(run.user.as_deref())
}

fn check_run_id(run_id: &str) -> Result<(), RequestError> {
    if run_id.is_empty() {
        return Err(RequestError::Empty { what: "run id" });
    }
    at_most("run id", run_id.len(), RUN_ID_BYTES_MAX)
}

fn check_env(vars: &[EnvVar]) -> Result<(), RequestError> {
    let total = vars.iter().map(|var| var.name.len() + var.value.len() + 2).sum();
    at_most("environment", total, ENV_BYTES_MAX)?;
    for var in vars {
        if var.name.is_empty() || var.name.contains(['=', '\0']) {
            return Err(RequestError::EnvName { name: var.name.clone() });
        }
        no_zero("environment", &var.value)?;
    }
    Ok(())
}

fn check_path(path: &str, user: Option<&str>) -> Result<(), RequestError> {
    at_most("path", path.len(), PATH_BYTES_MAX - 1)?;
    no_zero("path", path)?;
    if !path.starts_with('/') {
        return Err(RequestError::RelativePath { path: path.to_owned() });
    }
    check_user(user)
}

fn check_user(user: Option<&str>) -> Result<(), RequestError> {
    let Some(user) = user else { return Ok(()) };
    if user.is_empty() {
        return Err(RequestError::Empty { what: "user" });
    }
    at_most("user", user.len(), USER_BYTES_MAX)
}

fn check_configure(configure: &Configure) -> Result<(), RequestError> {
    if let Some(env) = &configure.env {
        check_env(&env.vars)?;
    }
    at_most("entropy", configure.entropy.len(), ENTROPY_BYTES_MAX)?;
    // Without it the guest would draw the same random numbers as its siblings.
    if configure.restored && configure.entropy.is_empty() {
        return Err(RequestError::Empty { what: "entropy of a restored guest" });
    }
    if let Some(token) = &configure.new_token
        && token.len() != TOKEN_BYTES
    {
        let (actual, wanted) = (token.len(), TOKEN_BYTES);
        return Err(RequestError::Length { what: "new token", actual, wanted });
    }
    check_layers(&configure.layers)?;
    few("interfaces", configure.interfaces.len())?;
    for interface in &configure.interfaces {
        few("addresses", interface.addresses.len())?;
        few("gateways", interface.gateways.len())?;
    }
    if let Some(dns) = &configure.dns {
        few("name servers", dns.servers.len())?;
        few("search domains", dns.search.len())?;
    }
    if let Some(hosts) = &configure.hosts {
        few("hosts entries", hosts.entries.len())?;
    }
    Ok(())
}

/// Each within the device, at its boundary, after the one before.
fn check_layers(layers: &[Layer]) -> Result<(), RequestError> {
    let (actual, limit) = (layers.len(), LAYERS_MAX);
    if actual > limit {
        return Err(RequestError::TooMany { what: "layers", actual, limit });
    }
    let mut free = 0;
    for layer in layers {
        let name = layer.name.chars().take(LAYER_NAME_BYTES_MAX).collect::<String>();
        at_most("name of a layer", layer.name.len(), LAYER_NAME_BYTES_MAX)?;
        let end = layer.offset.saturating_add(layer.length);
        let is_placed = layer.offset >= free
            && layer.offset % LAYER_ALIGN_BYTES == 0
            && layer.length > 0
            && layer.length % 4096 == 0
            && end <= LAYERS_DEVICE_BYTES;
        if !is_placed {
            return Err(RequestError::LayerPlace { name });
        }
        free = end;
    }
    Ok(())
}

fn at_most(what: &'static str, actual: usize, limit: usize) -> Result<(), RequestError> {
    if actual > limit { Err(RequestError::TooLarge { what, actual, limit }) } else { Ok(()) }
}

fn few(what: &'static str, actual: usize) -> Result<(), RequestError> {
    let limit = NETWORK_ITEMS_MAX;
    if actual > limit { Err(RequestError::TooMany { what, actual, limit }) } else { Ok(()) }
}

fn no_zero(what: &'static str, text: &str) -> Result<(), RequestError> {
    if text.contains('\0') { Err(RequestError::ZeroByte { what }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: Vec<String>) -> RequestBody {
        RequestBody::Run(Run { command: "true".into(), args, ..Run::default() })
    }

    #[test]
    fn argument_list_is_taken_up_to_its_limit_and_not_past_it() {
        let fits = "x".repeat(ARGS_BYTES_MAX - "true".len() - 2);
        assert_eq!(check_request(&run(vec![fits.clone()])), Ok(()));
        let error = check_request(&run(vec![fits + "x"])).unwrap_err();
        assert_eq!(error.code(), ErrorCode::TooLarge);
    }

    #[test]
    fn hostile_names_are_refused() {
        let relative = RequestBody::Stat(crate::Stat { path: "etc".into(), ..Default::default() });
        assert_eq!(check_request(&relative).unwrap_err().code(), ErrorCode::InvalidPath);
        assert_eq!(
            check_request(&run(vec!["a\0b".into()])).unwrap_err().code(),
            ErrorCode::InvalidArgument
        );
        let env = vec![EnvVar::new("A=B", "c")];
        let run = Run { command: "true".into(), env, ..Run::default() };
        let error = check_request(&RequestBody::Run(run)).unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
    }

    #[test]
    fn new_token_has_its_length_and_a_restored_guest_gets_entropy() {
        let with_token = |length: usize| {
            let new_token = Some(vec![1; length].into());
            check_request(&RequestBody::Configure(Configure { new_token, ..Default::default() }))
        };
        assert_eq!(with_token(TOKEN_BYTES), Ok(()));
        for length in [0, TOKEN_BYTES - 1, TOKEN_BYTES + 1] {
            assert_eq!(with_token(length).unwrap_err().code(), ErrorCode::InvalidArgument);
        }
        let mut restored = Configure { restored: true, ..Default::default() };
        assert!(check_request(&RequestBody::Configure(restored.clone())).is_err());
        restored.entropy = vec![1; 32].into();
        assert_eq!(check_request(&RequestBody::Configure(restored)), Ok(()));
    }

    #[test]
    fn layers_have_places_of_their_own_on_the_device() {
        let layer = |offset: u64, length: u64| Layer { name: "a@1".into(), offset, length };
        let check = |layers: &[Layer]| {
            let request = Configure { layers: layers.to_vec(), ..Default::default() };
            check_request(&RequestBody::Configure(request))
        };
        let mib = LAYER_ALIGN_BYTES;
        assert_eq!(check(&[layer(mib, mib + 4096), layer(3 * mib, 4096)]), Ok(()));
        for hostile in [
            &[layer(4096, 4096)][..],
            &[layer(mib, 0)],
            &[layer(mib, 100)],
            &[layer(mib, LAYERS_DEVICE_BYTES)],
            &[layer(u64::MAX - mib + 1, 1 << 40)],
            &[layer(mib, mib + 4096), layer(2 * mib, 4096)],
            &[layer(3 * mib, mib), layer(mib, mib)],
        ] {
            assert_eq!(check(hostile).unwrap_err().code(), ErrorCode::InvalidArgument);
        }
        let many = vec![layer(mib, 4096); LAYERS_MAX + 1];
        assert_eq!(check(&many).unwrap_err().code(), ErrorCode::TooLarge);
        let long = Layer { name: "x".repeat(129), ..layer(mib, 4096) };
        assert_eq!(check(&[long]).unwrap_err().code(), ErrorCode::TooLarge);
    }

    #[test]
    fn detached_run_needs_an_id() {
        let run = Run { command: "true".into(), detached: true, ..Run::default() };
        assert!(check_request(&RequestBody::Run(run)).is_err());
    }
}
