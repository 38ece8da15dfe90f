//! Templates: how they are built, deleted and read.

use super::{
    Lock, Sql, Tx,
    attempts::counts,
    create,
    place::Fleet,
    query::{Builder, in_turn, query},
    quotas, requests,
    rows::{self, template_columns},
    snapshots, write,
};
use crate::{
    Accepted, Idempotency, NewSnapshot, NewTask, NewTemplate, NewVm, Page, PageRequest, StoreError,
    TemplateFilter, error::Context,
};
use aether_types::{
    Origin, ProjectId, SnapshotPurpose, Task, TaskId, TaskKind, Template, TemplateId,
    TemplateProgress, TemplateState, Timestamp, project::Usage,
};

const GET: &str = concat!("select ", template_columns!(), " from templates where id = $1");

const OF_TASK: &str = concat!("select ", template_columns!(), " from templates where task_id = $1");

const BY_NAME: &str = concat!(
    "select ",
    template_columns!(),
    " from templates where project_id = $1 and name = $2 and tag = $3 and state <> 'deleted' \
     order by case state when 'ready' then 0 when 'building' then 1 else 2 end, \
     created_at desc, id desc limit 1"
);

pub(super) async fn build(
    store: &Sql,
    new: NewTemplate,
    snapshot: NewSnapshot,
    mut builder: NewVm,
    task: NewTask,
    idempotency: Option<Idempotency>,
) -> Result<(Accepted, Template), StoreError> {
    let fits =
        task.kind == TaskKind::TemplateBuild && snapshot.purpose == SnapshotPurpose::Template;
    requests::expect_kind(&task, fits)?;
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&requests::key_lock(idempotency.as_ref())).await?;
    let now = Timestamp::now();
    if let Some(earlier) = requests::earlier(&mut tx, idempotency.as_ref(), now).await? {
        let template = of_task(&mut tx, earlier.task.id).await?;
        return Ok((earlier, template.ok_or(StoreError::IdempotencyConflict)?));
    }
    let project = task.project.unwrap_or(ProjectId::DEFAULT);
    tx.lock(Lock::Project(project)).await?;
    tx.lock(Lock::Creation).await?;
    tx.lock(Lock::TemplateName { project, name: &new.name, tag: &new.tag }).await?;
    if let Some((earlier, template)) = equal_build(&mut tx, project, &new).await? {
        requests::remember(&mut tx, idempotency, earlier.task.id, now).await?;
        tx.commit("commit a repeated build of a template").await?;
        return Ok((earlier, template));
    }
    builder.spec.origin = Origin::Builder(new.id);
    let mut vm = create::creating(builder, project, now);
    // The VM in which it is built is none of the project's, but needs a machine.
    let asked = Usage { waiting_tasks: 1, ..quotas::machine(&vm) };
    quotas::admit(&mut tx, project, asked).await?;
    let snapshot = snapshots::creating(snapshot, &vm, now);
    let mut task = Task { snapshot_id: Some(snapshot.id), ..write::pending(&task, &vm, now) };
    let template = Template {
        id: new.id,
        project_id: project,
        name: new.name,
        tag: new.tag,
        state: TemplateState::Building,
        reason: None,
        spec: new.spec,
        digest: None,
        snapshot_id: snapshot.id,
        builder_id: vm.id,
        task_id: task.id,
        progress: TemplateProgress::default(),
        size_bytes: None,
        created_at: now,
        updated_at: now,
        generation: 1,
    };
    let mut fleet = Fleet::read(&mut tx).await?;
    create::insert_vm(&mut tx, &mut fleet, &mut vm, &mut task).await?;
    snapshots::insert(&mut tx, &snapshot).await?;
    insert(&mut tx, &template).await?;
    requests::remember(&mut tx, idempotency, task.id, now).await?;
    tx.commit("commit the build of a template").await?;
    Ok((Accepted { vm, task, repeated: false, cancelled: Vec::new() }, template))
}

/// A build of the same name from an equal specification that is under way, unless it was asked to
/// end.
async fn equal_build(
    tx: &mut Tx<'_>,
    project: ProjectId,
    new: &NewTemplate,
) -> Result<Option<(Accepted, Template)>, StoreError> {
    const BUILDING: &str = concat!(
        "select ",
        template_columns!(),
        " from templates where project_id = $1 and name = $2 and tag = $3 \
         and state <> 'deleted' and state = 'building' order by created_at desc, id desc"
    );
    let found = query(BUILDING)
        .bind(project.to_string())
        .bind(new.name.clone())
        .bind(new.tag.clone())
        .fetch_all(&mut *tx)
        .await
        .context("look for an equal build")?;
    for template in rows::all(&found, rows::template)? {
        let task = write::task(tx, template.task_id).await?.ok_or(StoreError::Corrupt("task"))?;
        if template.spec == new.spec && !task.cancel_requested {
            let vm = write::vm(tx, template.builder_id).await?.ok_or(StoreError::Corrupt("VM"))?;
            let accepted = Accepted { vm, task, repeated: true, cancelled: Vec::new() };
            return Ok(Some((accepted, template)));
        }
    }
    Ok(None)
}

async fn insert(tx: &mut Tx<'_>, template: &Template) -> Result<(), StoreError> {
    query(
        "insert into templates (id, name, tag, state, spec, snapshot_id, builder_id, task_id, \
         progress, created_at, updated_at, generation, project_id) \
         values ($1, $2, $3, 'building', $4, $5, $6, $7, $8, $9, $9, 1, $10)",
    )
    .bind(template.id.to_string())
    .bind(template.name.clone())
    .bind(template.tag.clone())
    .bind(rows::json(&template.spec, "template to record")?)
    .bind(template.snapshot_id.to_string())
    .bind(template.builder_id.to_string())
    .bind(template.task_id.to_string())
    .bind(rows::json(&template.progress, "template to record")?)
    .bind(template.created_at.unix_ms())
    .bind(template.project_id.to_string())
    .execute(&mut *tx)
    .await
    .context("record a template")?;
    Ok(())
}

pub(super) async fn read(tx: &mut Tx<'_>, id: TemplateId) -> Result<Option<Template>, StoreError> {
    query(GET)
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await
        .context("read a template")?
        .as_ref()
        .map(rows::template)
        .transpose()
}

async fn of_task(tx: &mut Tx<'_>, id: TaskId) -> Result<Option<Template>, StoreError> {
    query(OF_TASK)
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await
        .context("read a task's template")?
        .as_ref()
        .map(rows::template)
        .transpose()
}

/// What the end of a build does to its template: with a digest it is ready, and the one that had
/// the name is deleted; without, it has failed.
pub(super) async fn settle(
    tx: &mut Tx<'_>,
    task: &Task,
    digest: Option<String>,
    size_bytes: Option<u64>,
    now: Timestamp,
) -> Result<(), StoreError> {
    let Some(digest) = digest else {
        let fault = snapshots::implied_fault(task);
        query(
            "update templates set state = 'failed', reason_code = $2, reason_message = $3, \
             updated_at = $4, generation = generation + 1 \
             where task_id = $1 and state = 'building'",
        )
        .bind(task.id.to_string())
        .bind(fault.code.as_str())
        .bind(fault.message)
        .bind(now.unix_ms())
        .execute(&mut *tx)
        .await
        .context("record that a template failed")?;
        return Ok(());
    };
    let template = of_task(tx, task.id).await?.ok_or(StoreError::Corrupt("template"))?;
    let project = template.project_id;
    tx.lock(Lock::TemplateName { project, name: &template.name, tag: &template.tag }).await?;
    let ready = in_turn(&[
        "update templates set state = 'deleted', updated_at = $6, generation = generation + 1 \
         where project_id = $7 and name = $2 and tag = $3 and state = 'ready'",
        "update templates set state = 'ready', digest = $4, size_bytes = $5, updated_at = $6, \
         generation = generation + 1 where id = $1 and state = 'building'",
    ])
    .bind(template.id.to_string())
    .bind(template.name)
    .bind(template.tag)
    .bind(digest)
    .bind(size_bytes.map(rows::size_column))
    .bind(now.unix_ms())
    .bind(project.to_string());
    tx.run(ready).await.context("record that a template is ready")
}

pub(super) async fn progress(
    store: &Sql,
    task: TaskId,
    epoch: i64,
    progress: TemplateProgress,
) -> Result<Template, StoreError> {
    const PROGRESS: &str = concat!(
        "update templates set progress = $3, updated_at = $4, generation = generation + 1 \
         where task_id = $1 and state = 'building' and exists (select 1 from tasks \
         where id = $1 and epoch = $2 and state = 'running' and ",
        counts!(),
        ") returning ",
        template_columns!()
    );
    let progress = rows::json(&progress, "progress to record")?;
    let mut writer = store.writer().await;
    let found = query(PROGRESS)
        .bind(task.to_string())
        .bind(epoch)
        .bind(progress)
        .bind(Timestamp::now().unix_ms())
        .fetch_all(&mut writer)
        .await
        .context("record the progress of a build")?;
    drop(writer);
    if let Some(row) = found.first() {
        return rows::template(row);
    }
    let known = super::tasks::get(store, task).await?.ok_or(StoreError::TaskNotFound)?;
    let builds = known.kind == TaskKind::TemplateBuild;
    Err(if builds { StoreError::Fenced } else { StoreError::TemplateNotFound })
}

pub(super) async fn delete(store: &Sql, id: TemplateId) -> Result<Template, StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Template(id)]).await?;
    let mut template = read(&mut tx, id).await?.ok_or(StoreError::TemplateNotFound)?;
    match template.state {
        TemplateState::Ready | TemplateState::Failed => {}
        TemplateState::Deleted => return Ok(template),
        TemplateState::Building => {
            let detail = format!(
                "the template `{}:{}` is being built; wait for that, or cancel the task {}",
                template.name, template.tag, template.task_id
            );
            return Err(StoreError::TemplateNotReady { detail });
        }
    }
    template.state = TemplateState::Deleted;
    template.updated_at = Timestamp::now();
    template.generation += 1;
    query("update templates set state = 'deleted', updated_at = $2, generation = $3 where id = $1")
        .bind(id.to_string())
        .bind(template.updated_at.unix_ms())
        .bind(template.generation)
        .execute(&mut tx)
        .await
        .context("delete a template")?;
    // The disk of such a VM is still to be made from the snapshot.
    let needed =
        query("select 1 from vms where origin = $1 and state in ('creating', 'starting') limit 1")
            .bind(id.to_string())
            .fetch_optional(&mut tx)
            .await
            .context("look for VMs that begin as a template")?;
    if needed.is_none() {
        snapshots::mark_deleted(&mut tx, template.snapshot_id, template.updated_at).await?;
    }
    tx.commit("commit a template's deletion").await?;
    Ok(template)
}

pub(super) async fn get(store: &Sql, id: TemplateId) -> Result<Option<Template>, StoreError> {
    query(GET)
        .bind(id.to_string())
        .fetch_optional(store)
        .await
        .context("read a template")?
        .as_ref()
        .map(rows::template)
        .transpose()
}

pub(super) async fn by_name(
    store: &Sql,
    project: ProjectId,
    name: &str,
    tag: &str,
) -> Result<Option<Template>, StoreError> {
    query(BY_NAME)
        .bind(project.to_string())
        .bind(name.to_owned())
        .bind(tag.to_owned())
        .fetch_optional(store)
        .await
        .context("read a template by its name")?
        .as_ref()
        .map(rows::template)
        .transpose()
}

pub(super) async fn list(
    store: &Sql,
    filter: &TemplateFilter,
    page: PageRequest,
) -> Result<Page<Template>, StoreError> {
    let limit = page.bounded_limit();
    let mut query = Builder::new(concat!("select ", template_columns!(), " from templates where "));
    if filter.states.is_empty() {
        query.push("state <> 'deleted'");
    } else {
        query.push_in("state", filter.states.iter().map(|s| s.as_str()));
    }
    if let Some(project) = filter.project {
        query.push(" and project_id = ").push_bind(project.to_string());
    }
    if let Some(name) = &filter.name {
        query.push(" and name = ").push_bind(name.clone());
    }
    if let Some(cursor) = page.after {
        query.push(" and (created_at, id) < (").push_bind(cursor.created_at_ms());
        query.push(", ").push_bind(cursor.id()).push(")");
    }
    query.push(" order by created_at desc, id desc limit ").push_bind(limit + 1);
    let found = query.build().fetch_all(store).await.context("list templates")?;
    Ok(Page::cut(rows::all(&found, rows::template)?, limit, rows::template_position))
}
