//! What a route takes and answers, said beside its handler.
//!
//! What all routes have in common (the key, the limits, the body's form) is not said here: the
//! document adds it.

use std::collections::{BTreeMap, BTreeSet};

use aether_api::{EVENT_STREAM_MEDIA_TYPE, IDEMPOTENCY_KEY_HEADER, Problem};
use aether_types::{ErrorCode, limits};
use axum::http::StatusCode;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use crate::{extract::IDEMPOTENCY_KEY_BYTES_MAX, problem};

/// A schema, and with it all that it names.
pub(crate) type Shape = fn(&mut SchemaGenerator) -> Schema;

pub(crate) const JSON: &str = "application/json";

pub(crate) struct Operation {
    pub(super) id: &'static str,
    pub(super) summary: &'static str,
    pub(super) about: &'static str,
    pub(super) params: Vec<Param>,
    pub(super) body: Option<Body>,
    pub(super) answers: Vec<Answer>,
    /// Codes of problems, by status.
    pub(super) refusals: BTreeMap<u16, BTreeSet<&'static str>>,
    /// Of a WebSocket: messages of the client, where it has any to send, and of the server.
    pub(super) messages: Option<(Option<Shape>, Shape)>,
}

pub(super) struct Param {
    pub(super) name: &'static str,
    pub(super) place: &'static str,
    pub(super) is_needed: bool,
    pub(super) about: &'static str,
    pub(super) shape: Shape,
}

pub(super) struct Body {
    pub(super) media: &'static str,
    pub(super) is_needed: bool,
    pub(super) shape: Shape,
}

pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) about: &'static str,
    pub(super) media: Option<&'static str>,
    pub(super) shape: Shape,
    pub(super) headers: &'static [&'static str],
    /// The shape is that of one message of many.
    pub(super) is_stream: bool,
}

/// How a task can end badly: the problem of a request that waited for it.
const OF_TASKS: &[ErrorCode] = &[
    ErrorCode::InsufficientCapacity,
    ErrorCode::DriverUnavailable,
    ErrorCode::ImageNotFound,
    ErrorCode::SnapshotDamaged,
    ErrorCode::SnapshotIncompatible,
    ErrorCode::SnapshotStateConflict,
    ErrorCode::TemplateBuildFailed,
    ErrorCode::ToolVersionNotFound,
    ErrorCode::ToolBuildFailed,
    ErrorCode::VmStateConflict,
    ErrorCode::VmStartFailed,
    ErrorCode::VmStartTimeout,
    ErrorCode::GuestPanic,
    ErrorCode::GuestShutdown,
    ErrorCode::GuestAgentLost,
    ErrorCode::VmmExited,
    ErrorCode::WorkerLost,
    ErrorCode::VmStopped,
    ErrorCode::GuestUnreachable,
    ErrorCode::GuestProtocol,
    ErrorCode::GuestRefused,
    ErrorCode::Cancelled,
    ErrorCode::AttemptsExhausted,
    ErrorCode::NoSpace,
];

/// `id` is a verb and its noun, and stays: clients are generated from it.
pub(crate) fn operation(id: &'static str, summary: &'static str) -> Operation {
    Operation {
        id,
        summary,
        about: "",
        params: Vec::new(),
        body: None,
        answers: Vec::new(),
        refusals: BTreeMap::new(),
        messages: None,
    }
}

impl Operation {
    pub(crate) fn about(mut self, about: &'static str) -> Self {
        self.about = about;
        self
    }

    pub(crate) fn query(mut self, name: &'static str, shape: Shape, about: &'static str) -> Self {
        self.params.push(Param { name, place: "query", is_needed: false, about, shape });
        self
    }

    pub(crate) fn need(mut self, name: &'static str, shape: Shape, about: &'static str) -> Self {
        self.params.push(Param { name, place: "query", is_needed: true, about, shape });
        self
    }

    pub(crate) fn flag(self, name: &'static str, about: &'static str) -> Self {
        self.query(name, of::<bool>, about)
    }

    pub(crate) fn header(mut self, name: &'static str, shape: Shape, about: &'static str) -> Self {
        self.params.push(Param { name, place: "header", is_needed: false, about, shape });
        self
    }

    pub(crate) fn page(self) -> Self {
        self.query("limit", page_limit, "Of the page.").query(
            "cursor",
            text,
            "`next_cursor` of the page before.",
        )
    }

    /// The client may wait for the end of what it asks for.
    pub(crate) fn wait(self, about: &'static str) -> Self {
        self.query("wait", wait, about).refuses(OF_TASKS)
    }

    /// The client may repeat it.
    pub(crate) fn once(self) -> Self {
        let about = "The same key with the same request gets the same answer, for a day.";
        self.header(IDEMPOTENCY_KEY_HEADER, idempotency_key, about)
            .refuses(&[ErrorCode::IdempotencyConflict])
    }

    pub(crate) fn body<T: JsonSchema>(self) -> Self {
        self.raw_body(JSON, of::<T>, true)
    }

    pub(crate) fn body_or_nothing<T: JsonSchema>(self) -> Self {
        self.raw_body(JSON, of::<T>, false)
    }

    pub(crate) fn raw_body(mut self, media: &'static str, shape: Shape, is_needed: bool) -> Self {
        self.body = Some(Body { media, is_needed, shape });
        self
    }

    /// 200.
    pub(crate) fn gives<T: JsonSchema>(self, about: &'static str) -> Self {
        self.answers(StatusCode::OK, about, Some(JSON), of::<T>, &[])
    }

    /// 200 from a request that makes or changes something, which can be found at `location`.
    pub(crate) fn settles<T: JsonSchema>(self, about: &'static str) -> Self {
        self.answers(StatusCode::OK, about, Some(JSON), of::<T>, &["location"])
    }

    /// 201.
    pub(crate) fn makes<T: JsonSchema>(self, about: &'static str) -> Self {
        self.answers(StatusCode::CREATED, about, Some(JSON), of::<T>, &["location"])
    }

    /// 202, with the task's path.
    pub(crate) fn accepts<T: JsonSchema>(self) -> Self {
        let about = "Recorded; `location` is the task that carries it out.";
        self.answers(StatusCode::ACCEPTED, about, Some(JSON), of::<T>, &["location"])
    }

    /// 204.
    pub(crate) fn gives_nothing(self, about: &'static str) -> Self {
        self.answers(StatusCode::NO_CONTENT, about, None, text, &[])
    }

    pub(crate) fn gives_bytes(self, about: &'static str, headers: &'static [&'static str]) -> Self {
        self.answers(StatusCode::OK, about, Some("application/octet-stream"), bytes, headers)
    }

    pub(crate) fn answers(
        mut self,
        status: StatusCode,
        about: &'static str,
        media: Option<&'static str>,
        shape: Shape,
        headers: &'static [&'static str],
    ) -> Self {
        self.answers.push(Answer { status, about, media, shape, headers, is_stream: false });
        self
    }

    /// 101: a WebSocket with such messages.
    pub(crate) fn talks(
        mut self,
        about: &'static str,
        client: Option<Shape>,
        server: Shape,
    ) -> Self {
        self.messages = Some((client, server));
        self.answers(StatusCode::SWITCHING_PROTOCOLS, about, None, text, &[])
    }

    /// 101, or 200 with server-sent events: the same messages either way.
    pub(crate) fn follows(self, message: Shape) -> Self {
        let about = "Server-sent events, with a message as the data of each.";
        self.talks("A WebSocket.", None, message).streams(about, EVENT_STREAM_MEDIA_TYPE, message)
    }

    /// 200, with one such message after the other.
    pub(crate) fn streams(self, about: &'static str, media: &'static str, message: Shape) -> Self {
        let mut operation = self.answers(StatusCode::OK, about, Some(media), message, &[]);
        operation.answers.iter_mut().rev().take(1).for_each(|answer| answer.is_stream = true);
        operation
    }

    pub(crate) fn refuses(mut self, codes: &[ErrorCode]) -> Self {
        for code in codes {
            let status = problem::status(*code).as_u16();
            self.refusals.entry(status).or_default().insert(code.as_str());
        }
        self
    }

    /// With another status than these codes have by themselves.
    pub(crate) fn refuses_as(mut self, status: StatusCode, codes: &[ErrorCode]) -> Self {
        let codes = codes.iter().map(|code| code.as_str());
        self.refusals.entry(status.as_u16()).or_default().extend(codes);
        self
    }

    /// What was named in the body does not exist.
    pub(crate) fn refuses_in_body(self, codes: &[ErrorCode]) -> Self {
        self.refuses_as(StatusCode::UNPROCESSABLE_ENTITY, codes)
    }
}

pub(crate) fn of<T: JsonSchema>(schemas: &mut SchemaGenerator) -> Schema {
    schemas.subschema_for::<T>()
}

/// A parameter that may be repeated, or have several values with commas between.
pub(crate) fn several<T: JsonSchema>(schemas: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "array", "items": schemas.subschema_for::<T>() })
}

pub(crate) fn text(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string" })
}

pub(crate) fn bytes(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "contentMediaType": "application/octet-stream" })
}

pub(crate) fn page_limit(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "integer", "minimum": 1, "maximum": limits::PAGE_LIMIT_MAX,
        "default": limits::PAGE_LIMIT_DEFAULT,
    })
}

/// As much as [`limits::WAIT_S_MAX`], in each of its spellings.
const WAIT: &str = "^0*(([12]?[0-9]{1,2}|300)s?|[0-5]m|([12]?[0-9]{1,5}|300000)ms)$";
const _: () = assert!(limits::WAIT_S_MAX == 300);

pub(crate) fn wait(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string", "pattern": WAIT,
        "description": format!(
            "Whole seconds, or a whole number with `ms`, `s` or `m`; {} s at most.",
            limits::WAIT_S_MAX
        ),
        "examples": ["5s"],
    })
}

fn idempotency_key(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string", "minLength": 1, "maxLength": IDEMPOTENCY_KEY_BYTES_MAX,
        "pattern": "^[!-~]([ -~]*[!-~])?$",
    })
}

/// A problem whose code is one of these.
pub(super) fn problem_of(
    schemas: &mut SchemaGenerator,
    status: u16,
    codes: &BTreeSet<&'static str>,
) -> Schema {
    json_schema!({
        "allOf": [schemas.subschema_for::<Problem>()],
        "properties": { "status": { "const": status }, "code": { "enum": codes } },
    })
}
