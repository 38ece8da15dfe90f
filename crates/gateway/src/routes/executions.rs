use std::{sync::Arc, time::Duration};

use aether_api::{
    Accepted, ExecuteRequest, ExecutionView, KeptOutput, NDJSON_MEDIA_TYPE, OUTPUT_BYTES_HEADER,
    OUTPUT_CUT_AT_HEADER, OUTPUT_CUT_BYTES_HEADER, Page, StreamEvent,
};
use aether_store::{Idempotency, NewExecution};
use aether_types::{
    ErrorCode, Execution, ExecutionId, ExecutionSpec, OutputStream, ProjectId, RetainedOutput,
    TaskKind, VmId,
};
use axum::{
    Json as JsonAnswer,
    body::Body,
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use bytes::{BufMut as _, Bytes, BytesMut};

use crate::{
    auth::Caller,
    extract::{Json, Once, Params},
    follow::Follower,
    openapi::{Operation, of, operation, wait},
    parts::App,
    problem::{ApiError, ApiResult},
    routes::{
        accepted,
        vms::{find, resolve},
    },
    submit::{Recorded, new_task_of, submit},
    wait::TaskWatch,
};

/// Records an execution. `id` may have a session that was opened before.
pub(super) async fn record(
    app: &App,
    project: ProjectId,
    vm: VmId,
    id: ExecutionId,
    spec: ExecutionSpec,
    idempotency: Option<Idempotency>,
) -> ApiResult<Recorded<Execution>> {
    let new = NewExecution { id, spec };
    let task = new_task_of(TaskKind::VmExecute, project);
    let store = Arc::clone(&app.parts.store);
    submit(app, async move {
        let (accepted, execution) = store.request_execution(vm, new, task, idempotency).await?;
        Ok(Recorded::new(accepted, execution))
    })
    .await
}

pub(super) async fn execute(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    once: Once,
    mut params: Params,
    body: Json<ExecuteRequest>,
) -> ApiResult<Response> {
    let wait = params.wait()?;
    let stream = params.flag("stream")?;
    params.finish()?;
    if stream && wait.is_some() {
        return Err(ApiError::invalid("wait: not together with stream".into()));
    }
    let spec = ExecutionSpec::from(body.value);
    spec.validate().map_err(ApiError::invalid)?;
    let vm = resolve(&app, &caller, &vm).await?;
    let idempotency = once.idempotency(&body.bytes);
    let id = ExecutionId::new();
    if stream {
        return execute_stream(&app, &caller, vm, id, spec, idempotency).await;
    }
    let watch = wait.map(|_| TaskWatch::new(&app));
    let recorded = record(&app, caller.project(), vm, id, spec, idempotency).await?;
    match watch.zip(wait) {
        Some((watch, limit)) => execute_wait(&app, recorded, watch, limit).await,
        None => Ok(accepted(Accepted::new(&recorded.accepted.task, vm))),
    }
}

async fn execute_wait(
    app: &App,
    recorded: Recorded<Execution>,
    mut watch: TaskWatch,
    limit: Duration,
) -> ApiResult<Response> {
    let Recorded { accepted: asked, made: execution, .. } = recorded;
    let task = asked.task;
    let ended = task.state.is_end() || watch.ended_within(task.id, limit).await?.is_some();
    if !ended {
        let now = app.store().task(task.id).await?.unwrap_or(task);
        return Ok(accepted(Accepted::new(&now, execution.vm_id)));
    }
    let id = task.execution_id.ok_or_else(ApiError::internal)?;
    let view = view_with_output(app, id).await?.ok_or_else(|| not_found(&id.to_string()))?;
    Ok((StatusCode::OK, JsonAnswer(view)).into_response())
}

async fn execute_stream(
    app: &App,
    caller: &Caller,
    vm: VmId,
    id: ExecutionId,
    spec: ExecutionSpec,
    idempotency: Option<Idempotency>,
) -> ApiResult<Response> {
    let place = app.stream_place()?;
    let watch = TaskWatch::new(app);
    let client = app.parts.sessions.follow(vm, id).await?;
    let recorded = record(app, caller.project(), vm, id, spec, idempotency).await?;
    let follower = Follower::new(app, watch, client, &recorded, place);
    let lines = futures::stream::unfold(follower, |mut follower| async move {
        let event = follower.next().await?;
        Some((line(&event), follower))
    });
    let kind = [(header::CONTENT_TYPE, NDJSON_MEDIA_TYPE)];
    Ok((StatusCode::OK, kind, Body::from_stream(lines)).into_response())
}

fn line(event: &StreamEvent) -> Result<Bytes, serde_json::Error> {
    let mut writer = BytesMut::new().writer();
    serde_json::to_writer(&mut writer, event)?;
    let mut line = writer.into_inner();
    line.put_u8(b'\n');
    Ok(line.freeze())
}

/// The execution, with its output once it has ended.
async fn view_with_output(app: &App, id: ExecutionId) -> ApiResult<Option<ExecutionView>> {
    let store = app.store();
    let (execution, stdout, stderr) = tokio::try_join!(
        store.execution(id),
        store.output(id, OutputStream::Stdout),
        store.output(id, OutputStream::Stderr),
    )?;
    let Some(execution) = execution else { return Ok(None) };
    let output = execution.state.is_end().then_some(KeptOutput { stdout, stderr });
    Ok(Some(ExecutionView::new(execution, output.as_ref())))
}

pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    Path(vm): Path<String>,
    mut params: Params,
) -> ApiResult<JsonAnswer<Page<ExecutionView>>> {
    let page = params.page()?;
    params.finish()?;
    let vm = find(&app, &caller, &vm).await?;
    let found = app.store().executions(vm.id, page).await?;
    let items = found.items.into_iter().map(|e| ExecutionView::new(e, None)).collect();
    Ok(JsonAnswer(Page { items, next_cursor: found.next.map(|c| c.to_string()) }))
}

fn not_found(text: &str) -> ApiError {
    let shown: String = text.chars().take(64).collect();
    ApiError::new(ErrorCode::ExecutionNotFound, format!("there is no execution `{shown}`"))
}

fn parse(text: &str) -> ApiResult<ExecutionId> {
    text.parse().map_err(|_| not_found(text))
}

/// An execution of the caller's project.
async fn find_execution(app: &App, caller: &Caller, text: &str) -> ApiResult<Execution> {
    let found = app.store().execution(parse(text)?).await?;
    found.filter(|e| e.project_id == caller.project()).ok_or_else(|| not_found(text))
}

async fn check_vm(app: &App, caller: &Caller, vm: &str, text: &str) -> ApiResult<()> {
    let vm = resolve(app, caller, vm).await?;
    let found = find_execution(app, caller, text).await?;
    if found.vm_id == vm { Ok(()) } else { Err(not_found(text)) }
}

pub(super) async fn show(
    State(app): State<App>,
    caller: Caller,
    Path(execution): Path<String>,
    params: Params,
) -> ApiResult<JsonAnswer<ExecutionView>> {
    params.finish()?;
    let id = find_execution(&app, &caller, &execution).await?.id;
    let view = view_with_output(&app, id).await?;
    view.map(JsonAnswer).ok_or_else(|| not_found(&execution))
}

pub(super) async fn show_of_vm(
    State(app): State<App>,
    caller: Caller,
    Path((vm, execution)): Path<(String, String)>,
    params: Params,
) -> ApiResult<JsonAnswer<ExecutionView>> {
    check_vm(&app, &caller, &vm, &execution).await?;
    show(State(app), caller, Path(execution), params).await
}

/// The kept bytes of one stream, raw.
pub(super) async fn output(
    State(app): State<App>,
    caller: Caller,
    Path(execution): Path<String>,
    mut params: Params,
) -> ApiResult<Response> {
    let stream = match params.one("stream")?.as_deref() {
        None | Some("stdout") => OutputStream::Stdout,
        Some("stderr") => OutputStream::Stderr,
        Some(_) => return Err(ApiError::invalid("stream: stdout or stderr is needed".into())),
    };
    params.finish()?;
    let id = find_execution(&app, &caller, &execution).await?.id;
    let output = app.store().output(id, stream).await?;
    let cut_bytes = output.cut_bytes();
    let RetainedOutput { mut head, tail, total_bytes } = output;
    let headers = [
        (header::CONTENT_TYPE.as_str(), "application/octet-stream".to_owned()),
        (OUTPUT_BYTES_HEADER, total_bytes.to_string()),
        (OUTPUT_CUT_BYTES_HEADER, cut_bytes.to_string()),
        (OUTPUT_CUT_AT_HEADER, head.len().to_string()),
    ];
    head.extend_from_slice(&tail);
    Ok((headers, head).into_response())
}

pub(super) async fn output_of_vm(
    State(app): State<App>,
    caller: Caller,
    Path((vm, execution)): Path<(String, String)>,
    params: Params,
) -> ApiResult<Response> {
    check_vm(&app, &caller, &vm, &execution).await?;
    output(State(app), caller, Path(execution), params).await
}

pub(super) fn execute_op() -> Operation {
    operation("execute", "Run a command in a VM")
        .about(
            "No shell reads it. It is never run a second time. Where the command ran, whatever its \
             exit code, the execution is `completed`.",
        )
        .once()
        .query("wait", wait, "For the end of the command; not together with `stream`.")
        .flag("stream", "Answer with its output as it comes.")
        .body::<ExecuteRequest>()
        .gives::<ExecutionView>("It has ended in time.")
        .streams("A message a line.", NDJSON_MEDIA_TYPE, of::<StreamEvent>)
        .accepts::<Accepted>()
        .refuses(&[ErrorCode::VmStateConflict, ErrorCode::QuotaExceeded])
}

pub(super) fn list_op() -> Operation {
    operation("listVmExecutions", "List executions of a VM")
        .page()
        .gives::<Page<ExecutionView>>("A page, newest first, without output.")
}

pub(super) fn show_op() -> Operation {
    operation("getExecution", "Show an execution with its output")
        .gives::<ExecutionView>("The execution.")
}

pub(super) fn show_of_vm_op() -> Operation {
    operation("getVmExecution", "Show an execution of a VM with its output")
        .gives::<ExecutionView>("The execution.")
}

pub(super) fn output_op() -> Operation {
    output_as("getExecutionOutput", "Read what was kept of an execution's output")
}

pub(super) fn output_of_vm_op() -> Operation {
    output_as("getVmExecutionOutput", "Read what was kept of an execution's output, by its VM")
}

fn output_as(id: &'static str, summary: &'static str) -> Operation {
    operation(id, summary)
        .query("stream", of::<OutputStream>, "`stdout` where it is not given.")
        .gives_bytes(
            "The bytes, first and last ones.",
            &[OUTPUT_BYTES_HEADER, OUTPUT_CUT_BYTES_HEADER, OUTPUT_CUT_AT_HEADER],
        )
}
