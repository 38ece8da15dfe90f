//! Where what is counted goes: one recorder of the process, read by `GET /metrics`.

use std::{sync::Arc, time::Duration};

use aether_logs::LogSink;
use metrics::{counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use metrics_process::Collector;
use tokio::task::JoinHandle;

use crate::failure::Failure;

/// In seconds: from a claim's milliseconds to a build's minutes.
const BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    300.0, 900.0,
];

/// What was measured is put into its bucket at least so often: without a reader it would pile up.
const UPKEEP: Duration = Duration::from_secs(10);

const BUILD: &str = "aether_build_info";
const LINES_LOST: &str = "aether_log_lines_lost_total";

pub(crate) struct Metrics {
    pub(crate) read: Arc<dyn Fn() -> String + Send + Sync>,
    upkeep: JoinHandle<()>,
}

impl Drop for Metrics {
    fn drop(&mut self) {
        self.upkeep.abort();
    }
}

impl Metrics {
    /// Once in a process.
    pub(crate) fn start(logs: LogSink) -> Result<Self, Failure> {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), BUCKETS)
            .map_err(|e| Failure::internal("set up the metrics", &e))?
            .build_recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder)
            .map_err(|e| Failure::internal("start the metrics", &e))?;
        aether_gateway::metrics::describe();
        aether_worker::metrics::describe();
        describe_gauge!(BUILD, "Always 1; the program's version is its label.");
        describe_counter!(LINES_LOST, "Log lines that came faster than they could be kept.");
        gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        let process = Collector::default();
        process.describe();
        let shown = handle.clone();
        let read = Arc::new(move || {
            process.collect();
            counter!(LINES_LOST).absolute(logs.lost());
            shown.render()
        });
        let upkeep = tokio::spawn(async move {
            let mut turns = tokio::time::interval(UPKEEP);
            loop {
                turns.tick().await;
                handle.run_upkeep();
            }
        });
        Ok(Self { read, upkeep })
    }
}
