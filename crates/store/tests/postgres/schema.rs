//! Both engines have the same tables: columns with their kinds, whether they may be null, their
//! defaults, keys, references and indexes, compared in one form.

use std::collections::BTreeSet;

use aether_postgres::testing;
use sqlx::{AssertSqlSafe, Connection as _, Row as _, SqliteConnection, sqlite::SqliteRow};

/// A fact is a line; a schema is a set of them.
type Facts = BTreeSet<String>;

#[tokio::test]
async fn both_engines_have_the_same_schema() {
    let Some((_, postgres)) = crate::engines::postgres().await else { return };
    let (sqlite, postgres) = (sqlite().await, of_postgres(&postgres));
    let only = |one: &Facts, other: &Facts| one.difference(other).cloned().collect::<Vec<_>>();
    let nothing: Vec<String> = Vec::new();
    assert_eq!(only(&sqlite, &postgres), nothing, "only in SQLite");
    assert_eq!(only(&postgres, &sqlite), nothing, "only in PostgreSQL");
    assert!(sqlite.len() > 150, "{}", sqlite.len());
}

/// From 4 on every migration is there twice, under one number.
#[test]
fn migrations_have_the_same_numbers() {
    let numbers = |engine: &str| {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
        let files = std::fs::read_dir(folder.join(engine)).unwrap();
        let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        let numbers = names.map(|name| name.split('_').next().unwrap().parse::<u32>().unwrap());
        numbers.filter(|number| *number >= 4).collect::<BTreeSet<_>>()
    };
    assert_eq!(numbers("sqlite"), numbers("postgres"));
}

async fn sqlite() -> Facts {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store.db");
    let store = aether_store::SqliteStore::open(&path, aether_store::Durability::Process).await;
    store.unwrap().close().await.unwrap();
    let mut db = SqliteConnection::connect(&format!("sqlite://{}", path.display())).await.unwrap();
    let mut facts = Facts::new();
    let tables = "select name from sqlite_schema where type = 'table' \
         and name not like 'sqlite_%' and name not like '\\_sqlx%' escape '\\'";
    for table in texts(&mut db, tables.to_owned()).await {
        columns_of_sqlite(&mut db, &table, &mut facts).await;
        let references =
            format!("select \"from\", \"table\" from pragma_foreign_key_list('{table}')");
        for row in rows(&mut db, references).await {
            let (from, to): (String, String) = (row.get(0), row.get(1));
            facts.insert(format!("{table}.{from} references {to}"));
        }
    }
    let indexes = "select sql from sqlite_schema where type = 'index' and sql is not null";
    for sql in texts(&mut db, indexes.to_owned()).await {
        facts.insert(index(&sql));
    }
    facts
}

async fn columns_of_sqlite(db: &mut SqliteConnection, table: &str, facts: &mut Facts) {
    let columns =
        format!("select name, type, \"notnull\", dflt_value, pk from pragma_table_info('{table}')");
    let mut key: Vec<(i64, String)> = Vec::new();
    for row in rows(db, columns).await {
        let (name, kind): (String, String) = (row.get(0), row.get(1));
        let null = if row.get::<i64, _>(2) == 0 { "null" } else { "not null" };
        let default: Option<String> = row.get(3);
        let kind = match kind.to_lowercase().as_str() {
            "blob" => "bytes".to_owned(),
            // A key that the engine numbers must be called so.
            "integer" => "bigint".to_owned(),
            other => other.to_owned(),
        };
        facts.insert(column(table, &name, &kind, null, default.as_deref()));
        if row.get::<i64, _>(4) > 0 {
            key.push((row.get(4), name));
        }
    }
    key.sort();
    let key: Vec<_> = key.into_iter().map(|(_, name)| name).collect();
    facts.insert(format!("{table} key {}", key.join(", ")));
}

fn of_postgres(database: &testing::TestDatabase) -> Facts {
    let mut facts = Facts::new();
    let columns = "select table_name, column_name, data_type, is_nullable, column_default \
         from information_schema.columns where table_schema = 'public'";
    for line in lines(database, columns) {
        let [table, name, kind, null, default] = line.as_slice() else { panic!("{line:?}") };
        let kind = if kind == "bytea" { "bytes" } else { kind };
        let null = if null == "YES" { "null" } else { "not null" };
        // A number that the engine gives is no default in the other.
        let default =
            Some(default.as_str()).filter(|d| !d.is_empty() && !d.starts_with("nextval("));
        facts.insert(column(table, name, kind, null, default));
    }
    let keys = "select c.conrelid::regclass, string_agg(a.attname, ', ' order by k.place) \
         from pg_constraint c, unnest(c.conkey) with ordinality k (number, place), pg_attribute a \
         where c.contype = 'p' and c.connamespace = 'public'::regnamespace \
         and a.attrelid = c.conrelid and a.attnum = k.number group by 1";
    for line in lines(database, keys) {
        facts.insert(format!("{} key {}", line[0], line[1]));
    }
    let references = "select c.conrelid::regclass, a.attname, c.confrelid::regclass \
         from pg_constraint c join pg_attribute a \
         on a.attrelid = c.conrelid and a.attnum = c.conkey[1] \
         where c.contype = 'f' and c.connamespace = 'public'::regnamespace";
    for line in lines(database, references) {
        facts.insert(format!("{}.{} references {}", line[0], line[1], line[2]));
    }
    let indexes = "select indexdef from pg_indexes where schemaname = 'public' \
         and indexname not in (select conname from pg_constraint)";
    for line in lines(database, indexes) {
        facts.insert(index(&line[0]));
    }
    facts.retain(|fact| !fact.starts_with("aether_migrations"));
    facts
}

fn column(table: &str, name: &str, kind: &str, null: &str, default: Option<&str>) -> String {
    let default =
        default.map(|d| format!(" default {}", d.replace("::bigint", "").replace("::text", "")));
    format!("{table}.{name} {kind} {null}{}", default.unwrap_or_default())
}

/// Both in the words of the migrations, without what PostgreSQL adds to them.
fn index(sql: &str) -> String {
    let mut text = sql.to_lowercase().replace("public.", "").replace(" using btree", "");
    for cast in ["::text[]", "::text", "::bigint"] {
        text = text.replace(cast, "");
    }
    // `state = any (array['a', 'b'])` is how it keeps `state in ('a', 'b')`.
    text = text.replace("= any (array[", "in (").replace("])", ")");
    text = text.replace(['(', ')'], " ").replace(',', " , ");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Rows of a query, split into columns.
fn lines(database: &testing::TestDatabase, sql: &str) -> Vec<Vec<String>> {
    let text = database.execute(sql);
    text.lines().map(|line| line.split('|').map(str::to_owned).collect()).collect()
}

async fn rows(db: &mut SqliteConnection, sql: String) -> Vec<SqliteRow> {
    sqlx::query(AssertSqlSafe(sql)).fetch_all(db).await.unwrap()
}

async fn texts(db: &mut SqliteConnection, sql: String) -> Vec<String> {
    rows(db, sql).await.iter().map(|row| row.get(0)).collect()
}
