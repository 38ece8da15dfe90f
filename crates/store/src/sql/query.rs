//! One way to say a statement and to read its rows, whichever engine answers. Both engines read
//! the same text, with `$1` as the place of a value.
//!
//! This is what `sqlx::Any` is for, but closed: two engines, three kinds of values, and each value
//! and row in its engine's own form.

use std::{borrow::Cow, fmt::Write as _};

use sqlx::{
    AssertSqlSafe, Postgres, Row as _, Sqlite,
    postgres::{PgArguments, PgRow},
    sqlite::{SqliteArguments, SqliteRow},
};

/// A value in a statement. Whether it is null or not, its kind is known: PostgreSQL asks for it.
#[derive(Debug)]
pub(crate) enum Value<'q> {
    Text(Option<Cow<'q, str>>),
    Int(Option<i64>),
    Bytes(Cow<'q, [u8]>),
}

#[derive(Debug)]
pub(crate) struct Query<'q> {
    sql: Cow<'static, str>,
    values: Vec<Value<'q>>,
}

pub(crate) fn query<'q>(sql: &'static str) -> Query<'q> {
    Query { sql: sql.into(), values: Vec::new() }
}

impl<'q> Query<'q> {
    pub(crate) fn bind(mut self, value: impl Into<Value<'q>>) -> Self {
        self.values.push(value.into());
        self
    }

    pub(crate) async fn fetch_all(self, on: impl Target) -> Result<Vec<Row>, sqlx::Error> {
        on.fetch_all(self).await
    }

    pub(crate) async fn fetch_optional(self, on: impl Target) -> Result<Option<Row>, sqlx::Error> {
        Ok(on.fetch_all(self).await?.into_iter().next())
    }

    pub(crate) async fn fetch_one(self, on: impl Target) -> Result<Row, sqlx::Error> {
        self.fetch_optional(on).await?.ok_or(sqlx::Error::RowNotFound)
    }

    /// How many rows were changed.
    pub(crate) async fn execute(self, on: impl Target) -> Result<u64, sqlx::Error> {
        on.execute(self).await
    }

    pub(crate) fn sqlite(self) -> sqlx::query::Query<'q, Sqlite, SqliteArguments> {
        let mut query = sqlx::query(AssertSqlSafe(self.sql));
        for value in self.values {
            query = match value {
                Value::Text(text) => query.bind(text.map(Cow::into_owned)),
                Value::Int(int) => query.bind(int),
                Value::Bytes(bytes) => query.bind(bytes.into_owned()),
            };
        }
        query
    }

    pub(crate) fn postgres(self) -> sqlx::query::Query<'q, Postgres, PgArguments> {
        let mut query = sqlx::query(AssertSqlSafe(self.sql));
        for value in &self.values {
            query = match value {
                Value::Text(text) => query.bind(text.as_deref().map(without_nul)),
                Value::Int(int) => query.bind(*int),
                Value::Bytes(bytes) => query.bind(&**bytes),
            };
        }
        query
    }
}

/// PostgreSQL's text has no NUL. It can come only in the words of a failure, which may be a guest's.
fn without_nul(text: &str) -> Cow<'_, str> {
    if text.contains('\0') { text.replace('\0', "\u{fffd}").into() } else { text.into() }
}

/// Several statements in one text, over the same values, that SQLite runs one after another in one
/// round trip.
#[derive(Debug)]
pub(crate) struct Batch<'q> {
    pub(super) statements: &'static [&'static str],
    pub(super) values: Vec<Value<'q>>,
    pub(super) order: Order,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Kept,
    Free,
}

/// Statements that need not see one another's work, and touch different rows: PostgreSQL runs them
/// as one.
pub(crate) fn together<'q>(statements: &'static [&'static str]) -> Batch<'q> {
    Batch { statements, values: Vec::new(), order: Order::Free }
}

/// Statements that build on one another.
pub(crate) fn in_turn<'q>(statements: &'static [&'static str]) -> Batch<'q> {
    Batch { statements, values: Vec::new(), order: Order::Kept }
}

impl<'q> Batch<'q> {
    pub(crate) fn bind(mut self, value: impl Into<Value<'q>>) -> Self {
        self.values.push(value.into());
        self
    }

    pub(super) fn joined(self) -> Query<'q> {
        Query { sql: self.statements.join("; ").into(), values: self.values }
    }

    /// `with a0 as (…), a1 as (…) …`: all but the last as parts of the last.
    pub(super) fn nested(self) -> Query<'q> {
        let Some((last, first)) = self.statements.split_last() else {
            return Query { sql: "select 1".into(), values: Vec::new() };
        };
        let mut sql = String::new();
        for (i, statement) in first.iter().enumerate() {
            let lead = if i == 0 { "with" } else { "," };
            let _ = write!(sql, "{lead} a{i} as ({statement}) ");
        }
        sql.push_str(last);
        Query { sql: sql.into(), values: self.values }
    }

    pub(super) fn statements(&self) -> impl Iterator<Item = Query<'_>> {
        let values = || self.values.iter().map(Value::borrowed).collect();
        self.statements.iter().map(move |sql| Query { sql: (*sql).into(), values: values() })
    }
}

/// A statement whose text depends on what is asked for.
#[derive(Debug)]
pub(crate) struct Builder<'q>(Query<'q>);

impl<'q> Builder<'q> {
    pub(crate) fn new(sql: &'static str) -> Self {
        Self(Query { sql: sql.to_owned().into(), values: Vec::new() })
    }

    /// Only ever our own text; what comes from outside is bound.
    pub(crate) fn push(&mut self, sql: &'static str) -> &mut Self {
        self.0.sql.to_mut().push_str(sql);
        self
    }

    pub(crate) fn push_bind(&mut self, value: impl Into<Value<'q>>) -> &mut Self {
        self.0.values.push(value.into());
        let place = format!("${}", self.0.values.len());
        self.0.sql.to_mut().push_str(&place);
        self
    }

    /// `column in (…)`. There is at least one value.
    pub(crate) fn push_in(
        &mut self,
        column: &'static str,
        values: impl IntoIterator<Item = &'static str>,
    ) -> &mut Self {
        self.push(column);
        for (i, value) in values.into_iter().enumerate() {
            self.push(if i == 0 { " in (" } else { ", " }).push_bind(value);
        }
        self.push(")")
    }

    pub(crate) fn build(self) -> Query<'q> {
        self.0
    }
}

impl Value<'_> {
    fn borrowed(&self) -> Value<'_> {
        match self {
            Self::Text(text) => Value::Text(text.as_deref().map(Cow::Borrowed)),
            Self::Int(int) => Value::Int(*int),
            Self::Bytes(bytes) => Value::Bytes(Cow::Borrowed(bytes)),
        }
    }
}

macro_rules! values {
    ($($kind:ident($from:ty): $make:expr;)+) => {
        $(
            impl<'q> From<$from> for Value<'q> {
                fn from(value: $from) -> Self {
                    let make: fn($from) -> _ = $make;
                    Self::$kind(make(value))
                }
            }
        )+
    };
}

values! {
    Text(String): |text| Some(Cow::Owned(text));
    Text(Option<String>): |text| text.map(Cow::Owned);
    Text(&'q str): |text| Some(Cow::Borrowed(text));
    Text(Option<&'q str>): |text| text.map(Cow::Borrowed);
    Text(&'q String): |text| Some(Cow::Borrowed(text.as_str()));
    Int(i64): Some;
    Int(Option<i64>): |int| int;
    Int(u32): |int| Some(i64::from(int));
    Int(Option<i32>): |int| int.map(i64::from);
    Int(bool): |flag| Some(i64::from(flag));
    Bytes(Vec<u8>): Cow::Owned;
    Bytes(&'q [u8]): Cow::Borrowed;
}

#[derive(Debug)]
pub(crate) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

/// What both engines can read from a column.
pub(crate) trait Column<'r>:
    sqlx::Decode<'r, Sqlite> + sqlx::Type<Sqlite> + sqlx::Decode<'r, Postgres> + sqlx::Type<Postgres>
{
}

impl<'r, T> Column<'r> for T where
    T: sqlx::Decode<'r, Sqlite>
        + sqlx::Type<Sqlite>
        + sqlx::Decode<'r, Postgres>
        + sqlx::Type<Postgres>
{
}

impl Row {
    pub(crate) fn get<'r, T: Column<'r>>(&'r self, column: usize) -> Result<T, sqlx::Error> {
        match self {
            Self::Sqlite(row) => row.try_get(column),
            Self::Postgres(row) => row.try_get(column),
        }
    }
}

/// What runs statements: a transaction, the right to write, or the readers.
pub(crate) trait Target: Send {
    fn fetch_all(
        self,
        query: Query<'_>,
    ) -> impl Future<Output = Result<Vec<Row>, sqlx::Error>> + Send;

    fn execute(self, query: Query<'_>) -> impl Future<Output = Result<u64, sqlx::Error>> + Send;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_that_are_one_for_postgresql_keep_their_places() {
        let batch =
            together(&["insert into a values ($1)", "update b set c = $2", "delete from d"]);
        let query = batch.bind("x").bind(2_i64).nested();
        assert_eq!(
            query.sql,
            "with a0 as (insert into a values ($1)) , a1 as (update b set c = $2) delete from d"
        );
        assert_eq!(query.values.len(), 2);
    }

    #[test]
    fn places_of_values_are_numbered() {
        let mut builder = Builder::new("select 1 from a where ");
        builder.push_in("b", ["x", "y"]).push(" and c = ").push_bind(3_i64);
        assert_eq!(builder.build().sql, "select 1 from a where b in ($1, $2) and c = $3");
    }
}
