//! JSON Schemas of what has a form of its own in JSON, and of texts and maps with rules of their
//! own, which fields name with `#[schemars(with = "…")]`. All bounds are those of [`limits`].
//!
//! A schema counts characters where the rule counts bytes: what it refuses is refused, and a text
//! in which characters have more than one byte may be refused beyond that.

use std::{borrow::Cow, collections::BTreeSet};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use crate::{
    AllowRule, AuditId, EventPattern, EventTopic, ExecutionId, KeyId, PreciseTime, ProjectId,
    Scope, SnapshotId, TaskId, TemplateId, Timestamp, VmId, WorkerId, limits,
};

/// Without control characters.
const PRINTED: &str = r"^[^\u0000-\u001f\u007f-\u009f]*$";
const WITHOUT_NUL: &str = r"^[^\u0000]*$";

macro_rules! schemas {
    ($($name:ident = $schema:tt),+ $(,)?) => { $(
        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    )+ };
}

macro_rules! rules {
    ($($(#[$doc:meta])* $name:ident = $schema:tt),+ $(,)?) => {
        $(
            $(#[$doc])*
            #[derive(Debug)]
            pub struct $name;
        )+
        schemas!($($name = $schema),+);
    };
}

schemas! {
    AuditId = { "type": "string", "format": "uuid" },
    ExecutionId = { "type": "string", "format": "uuid" },
    KeyId = { "type": "string", "format": "uuid" },
    ProjectId = { "type": "string", "format": "uuid" },
    SnapshotId = { "type": "string", "format": "uuid" },
    TaskId = { "type": "string", "format": "uuid" },
    TemplateId = { "type": "string", "format": "uuid" },
    VmId = { "type": "string", "format": "uuid" },
    WorkerId = { "type": "string", "format": "uuid" },
    Timestamp = { "type": "string", "format": "date-time" },
    PreciseTime = { "type": "string", "format": "date-time" },
    Scope = {
        "type": "string",
        "enum": Scope::all().map(|scope| scope.to_string()).collect::<Vec<_>>(),
    },
    EventTopic = { "type": "string", "pattern": "^[a-z]+\\.[a-z]+$" },
    EventPattern = {
        "type": "string", "enum": patterns(), "examples": ["vm.running", "vm.*", "*"],
    },
    AllowRule = {
        "type": "string",
        "description": "`ADDRESS`, `ADDRESS/PREFIX`, `ADDRESS:PORT` or `ADDRESS:FIRST-LAST`, with \
            `/tcp` or `/udp` after a port.",
        "examples": ["192.0.2.0/24", "192.0.2.7:443/tcp"],
    },
}

rules! {
    /// A label of a host name.
    VmName = {
        "type": "string", "minLength": 1, "maxLength": limits::VM_NAME_BYTES_MAX,
        "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
    },
    /// Of a snapshot, a project, a template, or a tag.
    PlainName = {
        "type": "string", "minLength": 1, "maxLength": limits::SNAPSHOT_NAME_BYTES_MAX,
        "pattern": "^[a-z0-9][a-z0-9._-]*$",
    },
    /// For people.
    KeyName = {
        "type": "string", "minLength": 1, "maxLength": limits::KEY_NAME_BYTES_MAX,
        "pattern": PRINTED,
    },
    Image = { "type": "string", "minLength": 1, "maxLength": limits::IMAGE_NAME_BYTES_MAX },
    Zone = {
        "type": "string", "minLength": 1, "maxLength": limits::WORKER_NAME_BYTES_MAX,
        "pattern": PRINTED,
    },
    Env = {
        "type": "object", "maxProperties": limits::ENV_VARS_MAX,
        "propertyNames": { "minLength": 1, "pattern": r"^[^=\u0000]*$" },
        "additionalProperties": {
            "type": "string", "maxLength": limits::ENV_BYTES_MAX, "pattern": WITHOUT_NUL,
        },
    },
    Labels = {
        "type": "object", "maxProperties": limits::LABELS_MAX,
        "propertyNames": {
            "minLength": 1, "maxLength": limits::LABEL_KEY_BYTES_MAX,
            "pattern": "^[a-zA-Z0-9._/-]*$",
        },
        "additionalProperties": {
            "type": "string", "maxLength": limits::LABEL_VALUE_BYTES_MAX, "pattern": PRINTED,
        },
    },
    /// `go`, `go@1.23.1` or `go=1.23.1`.
    ToolText = {
        "type": "string", "minLength": 1,
        "maxLength": limits::TOOL_NAME_BYTES_MAX + 1 + limits::TOOL_VERSION_BYTES_MAX,
        "pattern": format!("^{}([@=]{})?$", tool_name(), tool_version()),
        "examples": ["go", "go@1.23.1"],
    },
    ToolTexts = {
        "type": "array", "maxItems": limits::TOOLS_MAX,
        "items": schema_of::<ToolText>(),
    },
    /// Versions by the name of the tool.
    ToolVersions = {
        "type": "object", "maxProperties": limits::TOOLS_MAX,
        "propertyNames": { "pattern": format!("^{}$", tool_name()) },
        "additionalProperties": { "type": "string", "pattern": format!("^{}$", tool_version()) },
    },
    /// In a guest.
    AbsolutePath = {
        "type": "string", "maxLength": limits::PATH_BYTES_MAX, "pattern": r"^/[^\u0000]*$",
    },
    /// In a guest, of a file: it stays where it says.
    FilePath = {
        "type": "string", "maxLength": limits::PATH_BYTES_MAX,
        "pattern": r"^(?![^\u0000]*/\.\.(/|$))/([^\u0000]*/)?(?!\.?$)[^/\u0000]+$",
    },
    Folder = {
        "type": "string", "minLength": 1, "maxLength": limits::PATH_BYTES_MAX,
        "pattern": WITHOUT_NUL,
    },
    /// A name or `UID[:GID]` of a guest.
    User = {
        "type": "string", "minLength": 1, "maxLength": limits::USER_BYTES_MAX,
        "pattern": WITHOUT_NUL,
    },
    /// Permission bits in octal.
    Mode = { "type": "string", "pattern": "^0*[0-7]{1,4}$", "examples": ["0644"] },
    /// A program, or one line of a shell.
    Command = {
        "type": "string", "minLength": 1, "maxLength": limits::ARG_BYTES_MAX,
        "pattern": WITHOUT_NUL,
    },
    Args = {
        "type": "array", "maxItems": limits::ARGS_MAX,
        "items": { "type": "string", "maxLength": limits::ARG_BYTES_MAX, "pattern": WITHOUT_NUL },
    },
}

fn tool_name() -> String {
    format!("[a-z][a-z0-9-]{{0,{}}}", limits::TOOL_NAME_BYTES_MAX - 1)
}

/// With no space at its ends.
fn tool_version() -> String {
    let (plain, inner) = ("A-Za-z0-9.+_~^<>=*|,-", limits::TOOL_VERSION_BYTES_MAX - 2);
    format!("[{plain}]([ {plain}]{{0,{inner}}}[{plain}])?")
}

/// Every topic, all of a noun, and all.
fn patterns() -> BTreeSet<String> {
    let of_noun = |topic: &String| Some(format!("{}.*", topic.split_once('.')?.0));
    let nouns = EventTopic::all().filter_map(|topic| of_noun(&topic));
    EventTopic::all().chain(nouns).chain(["*".to_owned()]).collect()
}

fn schema_of<T: JsonSchema>() -> Schema {
    T::json_schema(&mut SchemaGenerator::default())
}
