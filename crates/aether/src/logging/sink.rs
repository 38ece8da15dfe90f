//! The platform's own lines on their way to the log store.

use std::fmt::{self, Write as _};

use aether_logs::{LogEntry, LogLevel, LogService, LogSink, LogStream};
use aether_types::{TaskId, VmId};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span,
};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

/// What the log store says about itself must not become its own next line.
const NOT_SHIPPED: &str = "aether_logs";

pub(super) struct SinkLayer(pub(super) LogSink);

/// Whose an event is: of the event itself, or of the spans around it.
#[derive(Debug, Clone, Copy, Default)]
struct Owner {
    vm: Option<VmId>,
    task: Option<TaskId>,
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
    owner: Owner,
}

impl Line {
    fn record(&mut self, name: &str, value: fmt::Arguments<'_>) {
        match name {
            "message" => self.message = value.to_string(),
            "vm.id" => self.owner.vm = value.to_string().parse().ok(),
            "task.id" => self.owner.task = value.to_string().parse().ok(),
            name => {
                let _ = write!(self.fields, " {name}={value}");
            }
        }
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record(field.name(), format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record(field.name(), format_args!("{value}"));
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for SinkLayer {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, ctx: Context<'_, S>) {
        let mut line = Line::default();
        attributes.record(&mut line);
        if let Some(span) = ctx.span(id) {
            span.extensions_mut().insert(line.owner);
        }
    }

    fn on_event(&self, event: &Event<'_>, ctx: Context<'_, S>) {
        let target = event.metadata().target();
        if target.starts_with(NOT_SHIPPED) {
            return;
        }
        let mut line = Line::default();
        event.record(&mut line);
        let mut owner = line.owner;
        for span in ctx.event_scope(event).into_iter().flatten() {
            if let Some(around) = span.extensions().get::<Owner>() {
                owner.vm = owner.vm.or(around.vm);
                owner.task = owner.task.or(around.task);
            }
        }
        let text = format!("{target}: {}{}", line.message, line.fields);
        let entry =
            LogEntry::new(service(target), level(*event.metadata().level()), LogStream::Log, &text);
        self.0.write(entry.of_vm(owner.vm).of_task(owner.task));
    }
}

fn service(target: &str) -> LogService {
    match target.split("::").next().unwrap_or_default() {
        "aether_gateway" => LogService::Gateway,
        "aether_worker" | "aether_drivers" => LogService::Worker,
        _ => LogService::Platform,
    }
}

fn level(level: Level) -> LogLevel {
    match level {
        Level::ERROR => LogLevel::Error,
        Level::WARN => LogLevel::Warn,
        Level::INFO => LogLevel::Info,
        Level::DEBUG => LogLevel::Debug,
        Level::TRACE => LogLevel::Trace,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use aether_logs::{EmbeddedConfig, EmbeddedStore, LogQuery, LogStore};
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[tokio::test]
    async fn lines_have_their_owner_level_and_fields() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("logs.db");
        let store = EmbeddedStore::open(&path, EmbeddedConfig::default()).await.unwrap();
        let store: Arc<dyn LogStore> = Arc::new(store);
        let (sink, pipe) = LogSink::new(Arc::clone(&store));
        let (vm, task) = (VmId::new(), TaskId::new());
        tracing::subscriber::with_default(
            tracing_subscriber::registry().with(SinkLayer(sink)),
            || {
                let span = tracing::info_span!(target: "aether_worker", "work", task.id = %task);
                let _in = span.enter();
                let id = tracing::field::display(vm);
                tracing::warn!(target: "aether_worker::pool", { vm.id = id, left = 3 }, "it ends");
                tracing::error!(target: "aether_logs::loki", "not this one");
            },
        );
        pipe.close().await;
        let answer = store.query(&LogQuery::default()).await.unwrap();
        let [logged] = answer.entries.as_slice() else { panic!("{answer:?}") };
        let entry = &logged.entry;
        assert_eq!(entry.text(), "aether_worker::pool: it ends left=3");
        assert_eq!((entry.service, entry.level), (LogService::Worker, LogLevel::Warn));
        assert_eq!((entry.vm_id, entry.task_id), (Some(vm), Some(task)));
    }
}
