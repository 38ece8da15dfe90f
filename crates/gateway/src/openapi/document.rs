//! From the table of routes to the document.

use std::collections::{BTreeMap, BTreeSet};

use aether_api::{
    FILE_MODE_HEADER, FILE_SIZE_HEADER, OUTPUT_BYTES_HEADER, OUTPUT_CUT_AT_HEADER,
    OUTPUT_CUT_BYTES_HEADER, PREFIX, PROBLEM_MEDIA_TYPE, REQUEST_ID_HEADER,
};
use aether_types::{ErrorCode, limits};
use axum::http::{Method, StatusCode};
use schemars::{SchemaGenerator, generate::SchemaSettings, json_schema};
use serde_json::{Map, Value, json};

use super::operation::{Answer, JSON, Operation, Param, problem_of};
use crate::auth::Rule;

/// A row of the table.
pub(crate) struct Entry {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) rule: Rule,
    pub(crate) operation: Operation,
}

/// Name, meaning, schema.
type Header = (&'static str, &'static str, fn() -> Value);

const LIMITED: [&str; 2] = ["ratelimit", "ratelimit-policy"];

const HEADERS: &[Header] = &[
    (REQUEST_ID_HEADER, "The client's own where that is sane, else made.", string),
    ("location", "Where what was made, or the task that makes it, can be asked for.", string),
    (
        "ratelimit",
        "What is left of each limit that was looked at: `\"key\";r=LEFT;t=SECONDS`.",
        string,
    ),
    ("ratelimit-policy", "The limits that were looked at: `\"key\";q=BURST;w=SECONDS`.", string),
    ("retry-after", "Seconds.", count),
    ("www-authenticate", "The scheme.", string),
    ("etag", "Of the document.", string),
    (OUTPUT_BYTES_HEADER, "Written in all.", count),
    (OUTPUT_CUT_BYTES_HEADER, "Of them, not kept.", count),
    (OUTPUT_CUT_AT_HEADER, "Where in the answer those are missing.", count),
    (FILE_SIZE_HEADER, "When the file was opened.", count),
    (FILE_MODE_HEADER, "Permission bits, in octal, when the file was opened.", string),
];

const TAGS: &[(&str, &str)] = &[
    ("vms", "VMs and what can be done with them."),
    ("executions", "Commands in VMs, and their output."),
    ("files", "Files in VMs."),
    ("snapshots", "Memory, devices and disk of a VM at one moment."),
    ("templates", "What VMs begin as, and machines that wait to become VMs."),
    ("tools", "The catalogue of tools, and their layers."),
    ("tasks", "What was asked for and is carried out."),
    ("logs", "Lines of guests and of the platform."),
    ("events", "What has happened."),
    ("keys", "Keys and what they may."),
    ("audit", "Who did what."),
    ("projects", "Projects and their quotas."),
    ("workers", "Machines that have VMs."),
    ("queues", "Work that waits."),
    ("platform", "The platform itself."),
];

const ABOUT: &str = "\
Runs work in isolated microVMs. JSON in and out; what is not known in a request is refused by its \
name. Errors are problem documents (RFC 9457) whose `code` never changes its meaning. A request \
that is accepted with 202 is recorded, and will be carried out; `?wait=` waits for its end.";

fn string() -> Value {
    json!({ "type": "string" })
}

fn count() -> Value {
    json!({ "type": "integer", "minimum": 0 })
}

pub(crate) fn document(entries: Vec<Entry>) -> Value {
    let mut writer = Writer {
        // What a field needs differs with the direction: a client may leave out what has a default,
        // and an answer has it.
        given: SchemaSettings::draft2020_12()
            .with(in_components)
            .for_deserialize()
            .into_generator(),
        told: SchemaSettings::draft2020_12().with(in_components).for_serialize().into_generator(),
        responses: BTreeMap::new(),
    };
    let mut paths: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    for entry in entries {
        let (path, method) = (entry.path.clone(), entry.method.as_str().to_lowercase());
        let operation = writer.operation(entry);
        paths.entry(path).or_default().insert(method, operation);
    }
    let schemas = writer.schemas(&mut paths);
    let headers = HEADERS.iter().map(|(name, about, schema)| {
        ((*name).to_owned(), json!({ "description": about, "schema": schema() }))
    });
    let tags = TAGS.iter().map(|(name, about)| json!({ "name": name, "description": about }));
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Aetherium",
            "version": env!("CARGO_PKG_VERSION"),
            "description": ABOUT,
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/", "description": "The server that this document is of." }],
        "tags": tags.collect::<Vec<_>>(),
        "security": [{ "key": [] }],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": writer.responses,
            "headers": headers.collect::<Map<_, _>>(),
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A key of a project, or a JSON Web Token where the server takes them. \
                        What it may is said by its role and scopes; the scope that a route needs \
                        stands with the route.",
                },
            },
        },
    });
    bound_integers(&mut document);
    document
}

fn in_components(settings: &mut SchemaSettings) {
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
}

struct Writer {
    /// By clients.
    given: SchemaGenerator,
    /// To clients.
    told: SchemaGenerator,
    /// Those that many routes have.
    responses: BTreeMap<String, Value>,
}

impl Writer {
    fn operation(&mut self, entry: Entry) -> Value {
        let Entry { method: _, path, rule, operation } = entry;
        let operation = with_common(operation, &path, rule);
        let mut value = json!({
            "operationId": operation.id,
            "summary": operation.summary,
            "tags": [tag(&path)],
            "security": security(rule),
            "description": description(&operation, rule),
            "responses": self.answers(&operation, rule),
        });
        let mut params: Vec<_> = path_params(&path).collect();
        params.extend(operation.params.iter().map(|param| self.param(param)));
        if !params.is_empty() {
            value["parameters"] = params.into();
        }
        if let Some(body) = &operation.body {
            let schema = (body.shape)(&mut self.given);
            value["requestBody"] = json!({
                "required": body.is_needed,
                "content": { body.media: { "schema": schema } },
            });
        }
        if let Some((client, server)) = operation.messages {
            let mut messages = json!({ "server": server(&mut self.told) });
            if let Some(client) = client {
                messages["client"] = client(&mut self.given).into();
            }
            value["x-websocket-messages"] = messages;
        }
        value
    }

    fn param(&mut self, param: &Param) -> Value {
        let mut value = json!({
            "name": param.name,
            "in": param.place,
            "schema": (param.shape)(&mut self.given),
        });
        if param.is_needed {
            value["required"] = true.into();
        }
        if !param.about.is_empty() {
            value["description"] = param.about.into();
        }
        value
    }

    fn answers(&mut self, operation: &Operation, rule: Rule) -> Value {
        let mut answers: BTreeMap<String, Value> = BTreeMap::new();
        for answer in &operation.answers {
            let value = self.answer(answer, rule);
            match answers.get_mut(answer.status.as_str()) {
                // The same status in another form.
                Some(other) => merge(other, value),
                None => drop(answers.insert(answer.status.as_str().to_owned(), value)),
            }
        }
        for (status, codes) in &operation.refusals {
            let (name, status) = (self.problem(*status, codes, rule), status.to_string());
            let reference = json!({ "$ref": format!("#/components/responses/{name}") });
            match answers.get_mut(&status) {
                Some(other) => merge(other, self.responses[&name].clone()),
                None => drop(answers.insert(status, reference)),
            }
        }
        answers.into_iter().collect::<Map<_, _>>().into()
    }

    fn answer(&mut self, answer: &Answer, rule: Rule) -> Value {
        let mut value = json!({
            "description": answer.about,
            "headers": headers(answer.headers, rule),
        });
        if let Some(media) = answer.media {
            let mut schema = (answer.shape)(&mut self.told);
            if answer.is_stream {
                schema = json_schema!({
                    "type": "string", "contentMediaType": media, "contentSchema": schema,
                });
            }
            value["content"] = json!({ media: { "schema": schema } });
        }
        value
    }

    /// Its name among the components, since many routes have the same.
    fn problem(&mut self, status: u16, codes: &BTreeSet<&'static str>, rule: Rule) -> String {
        let of_status: &[&str] = match status {
            401 => &["www-authenticate"],
            429 | 503 => &["retry-after"],
            _ => &[],
        };
        let open = if rule == Rule::Open { ".open" } else { "" };
        let joined = codes.iter().copied().collect::<Vec<_>>().join(".");
        let name = format!("{status}.{joined}{open}");
        let named: Vec<_> = codes.iter().map(|code| format!("`{code}`")).collect();
        let schema = problem_of(&mut self.told, status, codes);
        let value = json!({
            "description": named.join(", "),
            "headers": headers(of_status, rule),
            "content": { PROBLEM_MEDIA_TYPE: { "schema": schema } },
        });
        self.responses.insert(name.clone(), value);
        name
    }

    /// All that are named. Where a type is not the same in both directions, what clients give has a
    /// name of its own.
    fn schemas(&mut self, paths: &mut BTreeMap<String, Map<String, Value>>) -> Map<String, Value> {
        let mut told = self.told.take_definitions(true);
        let given = self.given.take_definitions(true);
        let differ: Vec<_> = given
            .iter()
            .filter(|(name, schema)| told.get(*name).is_some_and(|other| other != *schema))
            .map(|(name, _)| name.clone())
            .collect();
        let differ = with_users(differ, &given, &told);
        for (name, mut schema) in given {
            rename(&mut schema, &differ);
            let name = if differ.contains(&name) { format!("{name}Input") } else { name };
            told.insert(name, schema);
        }
        for operation in paths.values_mut().flat_map(|path| path.iter_mut().map(|(_, value)| value))
        {
            for part in ["requestBody", "parameters"] {
                if let Some(part) = operation.get_mut(part) {
                    rename(part, &differ);
                }
            }
            if let Some(client) = operation.pointer_mut("/x-websocket-messages/client") {
                rename(client, &differ);
            }
        }
        told
    }
}

/// Also those types of both directions that have one of these in them.
fn with_users(
    mut differ: Vec<String>,
    given: &Map<String, Value>,
    told: &Map<String, Value>,
) -> Vec<String> {
    loop {
        let uses = |schema: &Value| {
            let text = schema.to_string();
            differ.iter().any(|name| text.contains(&format!("\"#/components/schemas/{name}\"")))
        };
        let more: Vec<_> = given
            .iter()
            .filter(|(name, schema)| {
                told.contains_key(*name) && !differ.contains(name) && uses(schema)
            })
            .map(|(name, _)| name.clone())
            .collect();
        if more.is_empty() {
            return differ;
        }
        differ.extend(more);
    }
}

fn rename(value: &mut Value, names: &[String]) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(path)) = fields.get_mut("$ref")
                && let Some(name) = path.strip_prefix("#/components/schemas/")
                && names.iter().any(|one| one == name)
            {
                path.push_str("Input");
            }
            fields.values_mut().for_each(|value| rename(value, names));
        }
        Value::Array(items) => items.iter_mut().for_each(|value| rename(value, names)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// What every route has, or every one with a key, with a body, or with such a path.
fn with_common(operation: Operation, path: &str, rule: Rule) -> Operation {
    let has_body = operation.body.as_ref().map(|body| body.media);
    let mut operation = operation
        .refuses(&[ErrorCode::InvalidRequest, ErrorCode::Internal, ErrorCode::Unavailable])
        .refuses_as(StatusCode::MISDIRECTED_REQUEST, &[ErrorCode::InvalidRequest])
        .header(REQUEST_ID_HEADER, super::text, "Returned, and in the log; made where it is none.");
    if rule != Rule::Open {
        operation = operation.refuses(&[ErrorCode::Unauthorized, ErrorCode::Forbidden]);
    }
    if path != crate::health::PATH {
        operation = operation.refuses(&[ErrorCode::RateLimited]);
    }
    if has_body.is_some() {
        operation = operation
            .refuses(&[ErrorCode::MalformedBody])
            .refuses_as(StatusCode::REQUEST_TIMEOUT, &[ErrorCode::MalformedBody]);
    }
    if has_body == Some(JSON) {
        operation = operation.refuses(&[ErrorCode::UnsupportedMediaType, ErrorCode::BodyTooLarge]);
    }
    for (name, _, missing) in NAMED {
        if path.contains(&format!("{{{name}}}")) {
            operation = operation.refuses(&[*missing]);
        }
    }
    operation
}

/// What paths name: by what, and what it means that it is not there.
const NAMED: &[(&str, &str, ErrorCode)] = &[
    ("vm", "A VM, by its name or its id.", ErrorCode::VmNotFound),
    ("task", "A task, by its id.", ErrorCode::TaskNotFound),
    ("execution", "An execution, by its id.", ErrorCode::ExecutionNotFound),
    ("snapshot", "A snapshot, by its name or its id.", ErrorCode::SnapshotNotFound),
    ("template", "A template: `NAME`, `NAME:TAG` or its id.", ErrorCode::TemplateNotFound),
    ("tool", "A tool, by its name or an alias.", ErrorCode::ToolNotFound),
    ("worker", "A worker, by its id or the name of its host.", ErrorCode::WorkerNotFound),
    ("queue", "`shared`, or the id of a worker.", ErrorCode::QueueNotFound),
    ("key", "A key, by its id.", ErrorCode::KeyNotFound),
    ("project", "A project, by its name or its id.", ErrorCode::ProjectNotFound),
];

fn path_params(path: &str) -> impl Iterator<Item = Value> {
    let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    names.map(|name| {
        let known = NAMED.iter().find(|(known, ..)| *known == name);
        json!({
            "name": name,
            "in": "path",
            "required": true,
            "description": known.map_or("", |(_, about, _)| about),
            "schema": { "type": "string", "minLength": 1 },
        })
    })
}

fn tag(path: &str) -> &'static str {
    let below = path.strip_prefix(PREFIX).unwrap_or_default();
    let noun = match below.split('/').skip(1).collect::<Vec<_>>()[..] {
        ["vms", _, "snapshots"] => "snapshots",
        ["vms", _, "files", ..] => "files",
        ["vms", _, "execute" | "executions" | "terminal", ..] => "executions",
        ["pools"] => "templates",
        ["cluster", _] => "workers",
        ["quota"] => "projects",
        [noun, ..] => noun,
        [] => "",
    };
    TAGS.iter().map(|(name, _)| *name).find(|name| *name == noun).unwrap_or("platform")
}

fn security(rule: Rule) -> Value {
    match rule {
        Rule::Open => json!([]),
        // The scope, as a role is named with schemes of this kind.
        Rule::Needs(scope) => json!([{ "key": [scope.to_string()] }]),
    }
}

fn description(operation: &Operation, rule: Rule) -> String {
    let needed = match rule {
        Rule::Open => "Needs no key.".to_owned(),
        Rule::Needs(scope) => format!("Needs `{scope}`."),
    };
    let body = match &operation.body {
        Some(body) if body.media == JSON => {
            format!(" A body has {} bytes at most.", limits::BODY_BYTES_MAX)
        }
        Some(_) | None => String::new(),
    };
    let about = if operation.about.is_empty() { "" } else { " " };
    format!("{}{about}{needed}{body}", operation.about)
}

fn headers(of_answer: &[&str], rule: Rule) -> Value {
    let limited = if rule == Rule::Open { &[][..] } else { &LIMITED };
    let names = [REQUEST_ID_HEADER].into_iter().chain(limited.iter().copied());
    let names = names.chain(of_answer.iter().copied());
    names
        .map(|name| (name.to_owned(), json!({ "$ref": format!("#/components/headers/{name}") })))
        .collect::<Map<_, _>>()
        .into()
}

/// Two forms of one status.
fn merge(into: &mut Value, from: Value) {
    let (Value::Object(into), Value::Object(from)) = (into, from) else { return };
    for (key, value) in from {
        match into.get_mut(&key) {
            Some(Value::String(text)) if key == "description" => {
                *text = format!("{text} Or: {}", value.as_str().unwrap_or_default());
            }
            Some(known) => merge(known, value),
            None => drop(into.insert(key, value)),
        }
    }
}

/// A number that does not fit its type is refused, which the name of its format says to people alone.
fn bound_integers(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            let most = match fields.get("format").and_then(Value::as_str) {
                Some("uint16") => Some(json!(u16::MAX)),
                Some("uint32") => Some(json!(u32::MAX)),
                Some("uint64" | "uint") => Some(json!(u64::MAX)),
                Some("int64") => Some(json!(i64::MAX)),
                _ => None,
            };
            if let Some(most) = most {
                fields.entry("maximum").or_insert(most);
            }
            fields.values_mut().for_each(bound_integers);
        }
        Value::Array(items) => items.iter_mut().for_each(bound_integers),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}
