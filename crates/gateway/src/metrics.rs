//! What is counted of requests, and `GET /metrics`.
//!
//! Names and labels are a promise: dashboards and alerts are made of them. A label has few values,
//! none of which a client chooses.

use std::{
    collections::HashMap,
    sync::PoisonError,
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{Method, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use metrics::{
    Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

use crate::{
    openapi::{Operation, operation, text},
    parts::App,
};

pub(crate) const PATH: &str = "/metrics";

/// The form that is answered: Prometheus' text.
const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A queue that does not answer in this time is shown as down, and the rest is answered.
const LIMIT: Duration = Duration::from_secs(1);

const REQUESTS: &str = "aether_http_requests_total";
const REQUEST_DURATION: &str = "aether_http_request_duration_seconds";
const IN_HAND: &str = "aether_http_requests_in_hand";
const QUEUE_UP: &str = "aether_queue_up";
const QUEUE_ENTRIES: &str = "aether_queue_entries";
const POOL_SPARES: &str = "aether_pool_spares";

/// All of them.
pub const NAMES: &[&str] =
    &[REQUESTS, REQUEST_DURATION, IN_HAND, QUEUE_UP, QUEUE_ENTRIES, POOL_SPARES];

/// Says what the gateway's metrics mean. Once the program's recorder is there.
pub fn describe() {
    describe_counter!(REQUESTS, "Requests answered, by method, route and status.");
    describe_histogram!(
        REQUEST_DURATION,
        Unit::Seconds,
        "From a request's head to the head of its answer, by method and route; a request that \
         waits for the end of a task waits here too."
    );
    describe_gauge!(IN_HAND, "Requests whose answer has not begun.");
    describe_gauge!(QUEUE_UP, "1 where the queue answered just now, else 0.");
    describe_gauge!(
        QUEUE_ENTRIES,
        "Entries of the queue: ready to be claimed, delayed, or leased by a worker."
    );
    describe_gauge!(POOL_SPARES, "Machines that wait to become a VM, by template.");
}

pub(crate) fn show_op() -> Operation {
    operation("getMetrics", "Show metrics, in Prometheus' text form").answers(
        StatusCode::OK,
        "The metrics.",
        Some(MEDIA_TYPE),
        text,
        &[],
    )
}

/// One request, from its head to the head of its answer.
pub(crate) struct Measured {
    pub(crate) begun: Instant,
    method: &'static str,
    route: String,
}

impl Measured {
    pub(crate) fn begin(request: &Request) -> Self {
        gauge!(IN_HAND).increment(1.0);
        // The pattern, and not the path: that has ids in it, and anything a client makes up.
        let route = request.extensions().get::<MatchedPath>();
        let route = route.map_or("none", MatchedPath::as_str).to_owned();
        Self { begun: Instant::now(), method: known(request.method()), route }
    }

    pub(crate) fn answered(&self, response: &Response) {
        let (method, route) = (self.method, self.route.clone());
        let status = response.status().as_str().to_owned();
        counter!(REQUESTS, "method" => method, "route" => route.clone(), "status" => status)
            .increment(1);
        histogram!(REQUEST_DURATION, "method" => method, "route" => route)
            .record(self.begun.elapsed());
    }
}

impl Drop for Measured {
    /// Also where the client has gone.
    fn drop(&mut self) {
        gauge!(IN_HAND).decrement(1.0);
    }
}

fn known(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

pub(crate) async fn show(State(app): State<App>) -> Response {
    look_at_queue(&app).await;
    look_at_pools(&app);
    ([(header::CONTENT_TYPE, MEDIA_TYPE)], (app.parts.metrics)()).into_response()
}

fn look_at_pools(app: &App) {
    let mut shown = app.pools_shown.lock().unwrap_or_else(PoisonError::into_inner);
    // Those that are there no more have none.
    let mut spares: HashMap<String, u32> = shown.drain().map(|name| (name, 0)).collect();
    let pools = app.parts.pools.pools().into_iter();
    spares.extend(pools.map(|pool| (pool.template, pool.ready)));
    for (template, ready) in spares {
        gauge!(POOL_SPARES, "template" => template.clone()).set(f64::from(ready));
        shown.insert(template);
    }
}

async fn look_at_queue(app: &App) {
    let depth = tokio::time::timeout(LIMIT, app.parts.queue.depth()).await;
    let Ok(Ok(depth)) = depth else {
        return gauge!(QUEUE_UP).set(0.0);
    };
    gauge!(QUEUE_UP).set(1.0);
    for (state, entries) in
        [("ready", depth.ready), ("delayed", depth.delayed), ("leased", depth.leased)]
    {
        #[expect(clippy::cast_precision_loss, reason = "a queue has no 2^53 entries")]
        gauge!(QUEUE_ENTRIES, "state" => state).set(entries as f64);
    }
}
