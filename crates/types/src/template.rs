//! A template: an image, steps on top of it, and a size, ready as a snapshot.
//!
//! ```text
//!   building ── built ──► ready ── delete ──► deleted
//!      └── failed ──► failed ─── delete ────────┘
//! ```

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    DriverKind, Fault, NetworkPolicy, ProjectId, SnapshotId, TaskId, TemplateId, Timestamp,
    ToolRequest, VmId, limits,
    snapshot::is_plain_name,
    tool::validate_tools,
    vm::{validate_env, validate_machine},
};

/// The name of the template that VMs get which ask for none.
pub const DEFAULT_TEMPLATE: &str = "default";
pub const DEFAULT_TAG: &str = "latest";
/// In place of a template's name: boot the image. No template is called so.
pub const NO_TEMPLATE: &str = "none";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum TemplateState {
    Building,
    Ready,
    Failed,
    Deleted,
}

impl TemplateState {
    pub const ALL: &'static [Self] = &[Self::Building, Self::Ready, Self::Failed, Self::Deleted];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Building => "building",
            Self::Ready => "ready",
            Self::Failed => "failed",
            Self::Deleted => "deleted",
        }
    }
}

impl fmt::Display for TemplateState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for TemplateState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.iter().copied().find(|s| s.as_str() == text).ok_or_else(|| {
            "unknown template state; one of building, ready, failed, deleted".to_owned()
        })
    }
}

/// What a template is made from. Its digest, with that of the image and the VMM's format, names
/// the snapshot: the same content is built once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateSpec {
    pub image: String,
    pub driver: DriverKind,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub disk_mb: u32,
    /// Of the build, and of every command in VMs made from it, unless they have their own.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Written before the first step.
    #[serde(default)]
    pub files: Vec<TemplateFile>,
    /// One after the other, as root; one that fails ends the build.
    #[serde(default)]
    pub steps: Vec<TemplateStep>,
    /// Run last and left running: a server that is up in every VM from its first moment.
    #[serde(default)]
    pub start: Option<String>,
    /// The snapshot is taken when this is so.
    #[serde(default)]
    pub ready: Option<TemplateReady>,
    /// What the build may reach.
    #[serde(default)]
    pub network: NetworkPolicy,
    /// By name, each once; there for the steps, and in every VM made from it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<ToolRequest>,
}

impl TemplateSpec {
    /// Checks what can be checked without the host; names the field and its bounds. Contents and
    /// values are never repeated.
    pub fn validate(&self) -> Result<(), String> {
        validate_machine(self.vcpus, self.memory_mb, self.disk_mb, &self.image)?;
        validate_env("env", &self.env)?;
        self.validate_files()?;
        if self.steps.len() > limits::TEMPLATE_STEPS_MAX {
            return Err(format!("steps: at most {}", limits::TEMPLATE_STEPS_MAX));
        }
        for (at, step) in self.steps.iter().enumerate() {
            validate_script(&format!("steps[{at}].run"), &step.run)?;
            validate_timeout(&format!("steps[{at}].timeout_s"), step.timeout_s)?;
        }
        if let Some(start) = &self.start {
            validate_script("start", start)?;
        }
        if let Some(ready) = &self.ready {
            validate_script("ready.command", &ready.command)?;
            validate_timeout("ready.timeout_s", ready.timeout_s)?;
        }
        validate_tools("tools", &self.tools)?;
        self.network.validate()
    }

    fn validate_files(&self) -> Result<(), String> {
        if self.files.len() > limits::TEMPLATE_FILES_MAX {
            return Err(format!("files: at most {}", limits::TEMPLATE_FILES_MAX));
        }
        let mut total = 0;
        for (at, file) in self.files.iter().enumerate() {
            if !is_file_path(&file.path) {
                return Err(format!(
                    "files[{at}].path: an absolute path of a file, without `..` and NUL, of at \
                     most {} bytes",
                    limits::PATH_BYTES_MAX
                ));
            }
            if file.mode > FILE_MODE_MAX {
                return Err(format!("files[{at}].mode: 0 to {FILE_MODE_MAX} (0o7777)"));
            }
            total += file.content.len();
        }
        if total > limits::TEMPLATE_FILES_BYTES_MAX {
            return Err(format!(
                "files: {total} bytes in all, at most {}; fetch or make larger ones in a step",
                limits::TEMPLATE_FILES_BYTES_MAX
            ));
        }
        Ok(())
    }

    /// What decides about the content of a template, in one spelling: the input of its digest.
    /// Time limits are not in it: they decide whether a build ends well, not what it makes.
    #[must_use]
    pub fn digest_input(&self) -> Vec<u8> {
        // A new field must be placed, or left out, on purpose.
        let Self {
            image,
            driver,
            vcpus,
            memory_mb,
            disk_mb,
            env,
            files,
            steps,
            start,
            ready,
            network,
            tools,
        } = self;
        let content = Content {
            form: if tools.is_empty() { 1 } else { 2 },
            image,
            driver: *driver,
            vcpus: *vcpus,
            memory_mb: *memory_mb,
            disk_mb: *disk_mb,
            env,
            files,
            steps: steps.iter().map(|step| step.run.as_str()).collect(),
            start: start.as_deref(),
            ready: ready.as_ref().map(|ready| ready.command.as_str()),
            network,
            tools,
        };
        serde_json::to_vec(&content).expect("text, numbers and maps by text are always JSON")
    }
}

/// In this order, which is the order of the bytes. `form` counts changes of it; what is as it was in
/// an earlier form keeps that form's bytes, and with them its name.
#[derive(Serialize)]
struct Content<'a> {
    form: u32,
    image: &'a str,
    driver: DriverKind,
    vcpus: u32,
    memory_mb: u32,
    disk_mb: u32,
    env: &'a BTreeMap<String, String>,
    files: &'a [TemplateFile],
    steps: Vec<&'a str>,
    start: Option<&'a str>,
    ready: Option<&'a str>,
    network: &'a NetworkPolicy,
    /// From form 2 on.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    tools: &'a [ToolRequest],
}

/// Permission bits, set-id and sticky bits.
const FILE_MODE_MAX: u32 = 0o7777;

fn is_file_path(path: &str) -> bool {
    path.len() <= limits::PATH_BYTES_MAX
        && path.starts_with('/')
        && !path.contains('\0')
        && !path.split('/').any(|part| part == "..")
        && path.rsplit('/').next().is_some_and(|last| !last.is_empty() && last != ".")
}

/// For `sh -c`: one argument.
fn validate_script(field: &str, script: &str) -> Result<(), String> {
    if script.is_empty() || script.len() > limits::ARG_BYTES_MAX || script.contains('\0') {
        return Err(format!("{field}: 1 to {} bytes without NUL", limits::ARG_BYTES_MAX));
    }
    Ok(())
}

fn validate_timeout(field: &str, timeout_s: Option<u64>) -> Result<(), String> {
    match timeout_s {
        Some(s) if s == 0 || s > limits::TEMPLATE_STEP_TIMEOUT_S_MAX => {
            Err(format!("{field}: 1 to {} seconds", limits::TEMPLATE_STEP_TIMEOUT_S_MAX))
        }
        _ => Ok(()),
    }
}

/// Lower-case letters and digits with hyphens, dots and underscores between them. It cannot look
/// like an id, since routes take either.
pub fn validate_template_name(name: &str) -> Result<(), String> {
    if name == NO_TEMPLATE {
        Err(format!("name: `{NO_TEMPLATE}` stands for no template; choose another"))
    } else if is_plain_name(name, limits::TEMPLATE_NAME_BYTES_MAX) {
        Ok(())
    } else {
        Err(format!(
            "name: 1 to {} lower-case letters, digits and inner `-`, `.`, `_`, and not an id",
            limits::TEMPLATE_NAME_BYTES_MAX
        ))
    }
}

/// Letters, digits, hyphens, dots and underscores, the first one a letter or digit.
pub fn validate_tag(tag: &str) -> Result<(), String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    let ok = tag.len() <= limits::TEMPLATE_TAG_BYTES_MAX
        && tag.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && tag.bytes().all(plain);
    if ok {
        Ok(())
    } else {
        Err(format!(
            "tag: 1 to {} letters, digits, `-`, `.` and `_`, with a letter or digit first",
            limits::TEMPLATE_TAG_BYTES_MAX
        ))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TemplateFile {
    /// Absolute, in the guest.
    #[cfg_attr(feature = "schema", schemars(with = "crate::schema::FilePath"))]
    pub path: String,
    /// UTF-8 text; other content is fetched or made by a step.
    #[cfg_attr(feature = "schema", schemars(length(max = limits::TEMPLATE_FILES_BYTES_MAX)))]
    pub content: String,
    /// Permission bits.
    #[serde(default = "default_file_mode")]
    #[cfg_attr(feature = "schema", schemars(range(max = FILE_MODE_MAX)))]
    pub mode: u32,
}

fn default_file_mode() -> u32 {
    0o644
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TemplateStep {
    /// For `sh -e -c`.
    #[cfg_attr(feature = "schema", schemars(with = "crate::schema::Command"))]
    pub run: String,
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = limits::TEMPLATE_STEP_TIMEOUT_S_MAX)))]
    pub timeout_s: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct TemplateReady {
    /// For `sh -c`; run again until it succeeds.
    #[cfg_attr(feature = "schema", schemars(with = "crate::schema::Command"))]
    pub command: String,
    /// Until then.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = limits::TEMPLATE_STEP_TIMEOUT_S_MAX)))]
    pub timeout_s: Option<u64>,
}

/// How far a build has come.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TemplateProgress {
    /// Steps that are done.
    pub done: u32,
    pub steps: u32,
    /// What is done now, in words.
    pub now: String,
    /// The end of what the steps said.
    pub log: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    pub id: TemplateId,
    pub project_id: ProjectId,
    /// `name:tag` is unique among the project's templates that are not deleted or failed; building it again makes
    /// a new template, which takes the name when it is ready.
    pub name: String,
    pub tag: String,
    pub state: TemplateState,
    /// Of the present state.
    pub reason: Option<Fault>,
    pub spec: TemplateSpec,
    /// What it was built from, as BLAKE3 in hex; known when it is ready.
    pub digest: Option<String>,
    pub snapshot_id: SnapshotId,
    /// The VM in which it is built, and the task.
    pub builder_id: VmId,
    pub task_id: TaskId,
    pub progress: TemplateProgress,
    pub size_bytes: Option<u64>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// Counts every change.
    pub generation: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> TemplateSpec {
        TemplateSpec {
            image: "debian".into(),
            driver: DriverKind::Qemu,
            vcpus: 1,
            memory_mb: 256,
            disk_mb: 512,
            env: [("B".to_owned(), "2".to_owned()), ("A".to_owned(), "1".to_owned())].into(),
            files: vec![TemplateFile {
                path: "/etc/motd".into(),
                content: "hello\n".into(),
                mode: 0o644,
            }],
            steps: vec![TemplateStep { run: "true".into(), timeout_s: None }],
            start: Some("server".into()),
            ready: Some(TemplateReady { command: "check".into(), timeout_s: Some(5) }),
            network: NetworkPolicy::default(),
            tools: Vec::new(),
        }
    }

    #[test]
    fn states_spell_themselves() {
        for &state in TemplateState::ALL {
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{state}\""));
            assert_eq!(state.to_string().parse(), Ok(state));
        }
        assert!("gone".parse::<TemplateState>().is_err());
    }

    /// Makes one change and gives the refusal.
    fn refusal(change: impl FnOnce(&mut TemplateSpec)) -> String {
        let mut spec = spec();
        assert_eq!(spec.validate(), Ok(()));
        change(&mut spec);
        spec.validate().unwrap_err()
    }

    #[test]
    fn a_refusal_names_the_field_and_its_bounds() {
        let step = |run: &str, timeout_s| TemplateStep { run: run.into(), timeout_s };
        let long = "x".repeat(limits::ARG_BYTES_MAX + 1);
        let cases: [(String, &str); 15] = [
            (refusal(|s| s.vcpus = 0), "vcpus: 0 is outside 1 to 32"),
            (refusal(|s| s.memory_mb = 1), "memory_mb: 1 is outside 96 to 1048576"),
            (refusal(|s| s.disk_mb = 1), "disk_mb: 1 is outside 64 to 1048576"),
            (refusal(|s| s.image.clear()), "image: 1 to 128 bytes"),
            (
                refusal(|s| drop(s.env.insert("A=B".into(), "1".into()))),
                "env: a name must not be empty or contain `=` or NUL",
            ),
            (refusal(|s| s.steps = vec![step("true", None); 101]), "steps: at most 100"),
            (
                refusal(|s| s.steps.push(step("", None))),
                "steps[1].run: 1 to 131071 bytes without NUL",
            ),
            (
                refusal(|s| s.steps.push(step(&long, None))),
                "steps[1].run: 1 to 131071 bytes without NUL",
            ),
            (
                refusal(|s| s.steps.push(step("true", Some(3601)))),
                "steps[1].timeout_s: 1 to 3600 seconds",
            ),
            (
                refusal(|s| s.steps.push(step("true", Some(0)))),
                "steps[1].timeout_s: 1 to 3600 seconds",
            ),
            (refusal(|s| s.start = Some("a\0b".into())), "start: 1 to 131071 bytes without NUL"),
            (
                refusal(|s| {
                    s.ready = Some(TemplateReady { command: String::new(), timeout_s: None });
                }),
                "ready.command: 1 to 131071 bytes without NUL",
            ),
            (
                refusal(|s| {
                    s.ready = Some(TemplateReady { command: "x".into(), timeout_s: Some(0) });
                }),
                "ready.timeout_s: 1 to 3600 seconds",
            ),
            (
                refusal(|s| {
                    let rule: crate::AllowRule = "192.0.2.7".parse().unwrap();
                    s.network.allow = vec![rule; limits::ALLOW_RULES_MAX + 1];
                }),
                "network.allow: at most 64 rules",
            ),
            (
                refusal(|s| s.tools = vec!["go@1".parse().unwrap(), "go@2".parse().unwrap()]),
                "tools: go is asked for as 1 and as 2; one VM has one version of a tool",
            ),
        ];
        for (refusal, expected) in cases {
            assert_eq!(refusal, expected);
        }
    }

    #[test]
    fn files_are_absolute_bounded_and_stay_where_they_say() {
        let file = |path: &str| TemplateFile { path: path.into(), content: "c".into(), mode: 0 };
        for good in ["/a", "/etc/a.conf", "/a..b/c", "/..."] {
            let spec = TemplateSpec { files: vec![file(good)], ..spec() };
            assert_eq!(spec.validate(), Ok(()), "{good}");
        }
        let long = format!("/{}", "x".repeat(limits::PATH_BYTES_MAX));
        for bad in ["", "/", "a", "./a", "/a/", "/a/.", "/..", "/../a", "/a/../b", "/a\0", &long] {
            let error = refusal(|s| s.files.push(file(bad)));
            let expected = "files[1].path: an absolute path of a file, without `..` and NUL, of at \
                            most 4095 bytes";
            assert_eq!(error, expected, "{bad}");
        }
        let error = refusal(|s| s.files[0].mode = 0o10000);
        assert_eq!(error, "files[0].mode: 0 to 4095 (0o7777)");
        let error = refusal(|s| s.files = vec![file("/a"); 101]);
        assert_eq!(error, "files: at most 100");
        let half = "x".repeat(limits::TEMPLATE_FILES_BYTES_MAX / 2);
        let secret = TemplateFile { path: "/a".into(), content: half, mode: 0 };
        let error = refusal(|s| s.files.extend([secret.clone(), secret]));
        assert!(error.starts_with("files: 1048582 bytes in all, at most 1048576;"), "{error}");
    }

    #[test]
    fn names_and_tags_are_plain() {
        for good in ["a", "default", "python-3.12", "x_y", &"x".repeat(63)] {
            assert_eq!(validate_template_name(good), Ok(()), "{good}");
        }
        assert!(validate_template_name(NO_TEMPLATE).is_err());
        let id = TemplateId::new().to_string();
        for bad in ["", "-a", "a-", "A", "a:b", "a/b", "a b", "\u{e4}", &"x".repeat(64), &id] {
            let error = validate_template_name(bad).unwrap_err();
            assert!(error.starts_with("name: 1 to 63 "), "{bad}: {error}");
        }
        for good in ["latest", "v1.2", "2026-07-28", "A_b", &"x".repeat(63)] {
            assert_eq!(validate_tag(good), Ok(()), "{good}");
        }
        for bad in ["", ".a", "-a", "_a", "a:b", "a/b", "a b", "\u{e4}", &"x".repeat(64)] {
            let error = validate_tag(bad).unwrap_err();
            assert!(error.starts_with("tag: 1 to 63 "), "{bad}: {error}");
        }
    }

    /// The bytes name snapshots that are on disks already: they change on purpose, with `form`.
    #[test]
    fn equal_content_has_equal_bytes() {
        let bytes = String::from_utf8(spec().digest_input()).unwrap();
        let expected = concat!(
            r#"{"form":1,"image":"debian","driver":"qemu","vcpus":1,"memory_mb":256,"#,
            r#""disk_mb":512,"env":{"A":"1","B":"2"},"#,
            r#""files":[{"path":"/etc/motd","content":"hello\n","mode":420}],"#,
            r#""steps":["true"],"start":"server","ready":"check","#,
            r#""network":NETWORK}"#,
        );
        let network = serde_json::to_string(&NetworkPolicy::default()).unwrap();
        assert_eq!(bytes, expected.replace("NETWORK", &network));

        let mut patient = spec();
        patient.steps[0].timeout_s = Some(1);
        patient.ready.as_mut().unwrap().timeout_s = None;
        assert_eq!(patient.digest_input(), spec().digest_input());
        let changes: [fn(&mut TemplateSpec); 12] = [
            |s| s.image.push('x'),
            |s| s.driver = DriverKind::Sim,
            |s| s.vcpus += 1,
            |s| s.memory_mb += 1,
            |s| s.disk_mb += 1,
            |s| s.env.clear(),
            |s| s.files[0].mode = 0o600,
            |s| s.steps[0].run.push('x'),
            |s| s.start = None,
            |s| s.ready = None,
            |s| s.network.allow.push("192.0.2.7".parse().unwrap()),
            |s| s.tools.push("go@1.23.1".parse().unwrap()),
        ];
        for (at, change) in changes.iter().enumerate() {
            let mut other = spec();
            change(&mut other);
            assert_ne!(other.digest_input(), spec().digest_input(), "change {at}");
        }

        let mut with_tools = spec();
        with_tools.tools = vec!["go@1.23.1".parse().unwrap(), "rust".parse().unwrap()];
        let bytes = String::from_utf8(with_tools.digest_input()).unwrap();
        let expected = expected.replace("NETWORK", &network).replace(r#""form":1"#, r#""form":2"#);
        let expected = expected.trim_end_matches('}');
        let tools = concat!(
            r#","tools":[{"name":"go","version":"1.23.1"},"#,
            r#"{"name":"rust","version":"latest"}]}"#,
        );
        assert!(bytes.starts_with(expected) && bytes.ends_with(tools), "{bytes}");
    }

    #[test]
    fn a_specification_round_trips_and_has_no_unknown_fields() {
        let text = serde_json::to_string(&spec()).unwrap();
        assert_eq!(serde_json::from_str::<TemplateSpec>(&text).unwrap(), spec());
        let unknown = text.replacen('{', r#"{"step":[],"#, 1);
        assert!(serde_json::from_str::<TemplateSpec>(&unknown).is_err());
    }
}
