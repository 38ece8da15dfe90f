//! Projects.

use aether_types::{Project, ProjectId, Timestamp};

use super::{
    Lock, Sql, Tx,
    query::{Builder, Row, in_turn, query},
    quotas, rows,
};
use crate::{
    Cursor, Page, PageRequest, StoreError,
    error::{Context, is_taken},
};

macro_rules! project_columns {
    () => {
        "id, name, created_at, quota_vms, quota_vcpus, quota_memory_mb, quota_waiting_tasks"
    };
}

const GET: &str =
    concat!("select ", project_columns!(), " from projects where id = $1 and deleted_at is null");

const BY_NAME: &str =
    concat!("select ", project_columns!(), " from projects where name = $1 and deleted_at is null");

pub(super) async fn insert(store: &Sql, project: Project) -> Result<(), StoreError> {
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[]).await?;
    let inserted = query(
        "insert into projects (id, name, created_at, quota_vms, quota_vcpus, quota_memory_mb, \
         quota_waiting_tasks) values ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(project.id.to_string())
    .bind(project.name.clone())
    .bind(project.created_at.unix_ms())
    .bind(project.quota.vms.map(i64::from))
    .bind(project.quota.vcpus.map(i64::from))
    .bind(project.quota.memory_mb.map(i64::from))
    .bind(project.quota.waiting_tasks.map(i64::from))
    .execute(&mut tx)
    .await;
    match inserted {
        Err(error) if is_taken(&error, "projects.name", "projects_live_name") => {
            return Err(StoreError::NameTaken { name: project.name });
        }
        inserted => inserted.context("record a project")?,
    };
    tx.commit("commit a project").await
}

pub(super) async fn get(store: &Sql, id: ProjectId) -> Result<Option<Project>, StoreError> {
    let asked = query(GET).bind(id.to_string());
    let row = asked.fetch_optional(store).await.context("read a project")?;
    row.as_ref().map(project).transpose()
}

pub(super) async fn by_name(store: &Sql, name: &str) -> Result<Option<Project>, StoreError> {
    let asked = query(BY_NAME).bind(name.to_owned());
    let row = asked.fetch_optional(store).await.context("read a project by its name")?;
    row.as_ref().map(project).transpose()
}

pub(super) async fn list(store: &Sql, page: PageRequest) -> Result<Page<Project>, StoreError> {
    let limit = page.bounded_limit();
    let mut query = Builder::new(concat!(
        "select ",
        project_columns!(),
        " from projects where deleted_at is null"
    ));
    if let Some(cursor) = page.after {
        query.push(" and (created_at, id) < (").push_bind(cursor.created_at_ms());
        query.push(", ").push_bind(cursor.id()).push(")");
    }
    query.push(" order by created_at desc, id desc limit ").push_bind(limit + 1);
    let found = query.build().fetch_all(store).await.context("list projects")?;
    let position = |p: &Project| Cursor::new(p.created_at.unix_ms(), &p.id.to_string());
    Ok(Page::cut(rows::all(&found, project)?, limit, position))
}

pub(super) async fn delete(store: &Sql, id: ProjectId) -> Result<(), StoreError> {
    if id == ProjectId::DEFAULT {
        let detail = "the default project is the platform's own, and stays".to_owned();
        return Err(StoreError::ProjectInUse { detail });
    }
    let mut writer = store.writer().await;
    let mut tx = writer.begin(&[Lock::Project(id)]).await?;
    expect_live(&mut tx, id).await?;
    expect_empty(&mut tx, id).await?;
    let delete = in_turn(&[
        "update api_keys set revoked_at = $2, hash = $3 \
         where project_id = $1 and revoked_at is null",
        "update projects set deleted_at = $2 where id = $1",
    ])
    .bind(id.to_string())
    .bind(Timestamp::now().unix_ms())
    .bind(vec![0_u8; 32]);
    tx.run(delete).await.context("delete a project")?;
    tx.commit("commit a project's deletion").await
}

/// Nothing is made in a project that is gone.
pub(super) async fn expect_live(tx: &mut Tx<'_>, id: ProjectId) -> Result<(), StoreError> {
    let found = query("select 1 from projects where id = $1 and deleted_at is null")
        .bind(id.to_string())
        .fetch_optional(&mut *tx)
        .await
        .context("look whether there is such a project")?;
    found.map(drop).ok_or(StoreError::ProjectNotFound)
}

async fn expect_empty(tx: &mut Tx<'_>, id: ProjectId) -> Result<(), StoreError> {
    let row = query(
        "select (select count(*) from vms where project_id = $1 and state <> 'deleted'), \
         (select count(*) from snapshots where project_id = $1 and state <> 'deleted'), \
         (select count(*) from templates where project_id = $1 and state <> 'deleted'), \
         (select count(*) from tasks where project_id = $1 and state in ('pending', 'running'))",
    )
    .bind(id.to_string())
    .fetch_one(&mut *tx)
    .await
    .context("look what a project has")?;
    let r = rows::Reader { row: &row, noun: "project" };
    let mut has = Vec::new();
    for (column, noun) in ["VMs", "snapshots", "templates", "open tasks"].iter().enumerate() {
        let count: i64 = r.get(column)?;
        if count > 0 {
            has.push(format!("{count} {noun}"));
        }
    }
    if has.is_empty() {
        return Ok(());
    }
    let detail = format!("the project has {}; delete them first", has.join(", "));
    Err(StoreError::ProjectInUse { detail })
}

fn project(row: &Row) -> Result<Project, StoreError> {
    let r = rows::Reader { row, noun: "project" };
    Ok(Project {
        id: r.parsed(0)?,
        name: r.get(1)?,
        created_at: r.time(2)?,
        quota: quotas::quota(row, 3)?,
    })
}
