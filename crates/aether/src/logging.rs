//! Logs go to standard error, and of the platform also to its log store; standard output is for
//! results.

mod sink;

use aether_logs::LogSink;
use clap::ValueEnum;
use tracing_subscriber::{EnvFilter, Layer as _, layer::SubscriberExt as _};

use crate::failure::Failure;
use sink::SinkLayer;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// `filter` is what `tracing` takes: `info`, or `warn,aether_worker=debug`. What passes it also goes
/// into `sink`.
pub(crate) fn start(format: LogFormat, filter: &str, sink: Option<LogSink>) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|e| Failure::usage(format!("--log-level: {filter:?}: {e}")))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(crate::output::is_watched()).with_target(true).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(true).boxed(),
    };
    tracing::subscriber::set_global_default(
        tracing_subscriber::registry()
            .with(lines.and_then(sink.map(SinkLayer)).with_filter(filter)),
    )
    .map_err(|e| Failure::internal("start logging", &e))
}
