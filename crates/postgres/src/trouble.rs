//! What an error of the database means for who asked.

/// What kind of error it is; that is, what may be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Two transactions were in each other's way, and this one was undone: it may be repeated.
    Conflict,
    /// No connection, lock or answer in time, or no room for one more connection.
    Busy,
    /// The connection is gone. What was not committed is undone; what was being committed when it
    /// went is not known.
    Lost,
    Other,
}

/// Classes and codes: PostgreSQL's manual, appendix A.
pub fn trouble(error: &sqlx::Error) -> Trouble {
    match error {
        sqlx::Error::PoolTimedOut => Trouble::Busy,
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::BeginFailed => Trouble::Lost,
        sqlx::Error::Database(e) => match e.code().as_deref() {
            // Serialization failure, deadlock.
            Some("40001" | "40P01") => Trouble::Conflict,
            // Lock not available, statement timeout.
            Some("55P03" | "57014") => Trouble::Busy,
            // The server stops or starts, or ended this session.
            Some("57P01" | "57P02" | "57P03" | "57P05" | "25P03") => Trouble::Lost,
            // Connection exceptions.
            Some(code) if code.starts_with("08") => Trouble::Lost,
            // Insufficient resources: no connection left, no memory. A full disk does not pass by
            // itself.
            Some("53000" | "53200" | "53300" | "53400") => Trouble::Busy,
            Some(_) | None => Trouble::Other,
        },
        _ => Trouble::Other,
    }
}

/// The unique index that refused a row.
pub fn violated(error: &sqlx::Error) -> Option<&str> {
    match error {
        sqlx::Error::Database(e) if e.is_unique_violation() => e.constraint(),
        _ => None,
    }
}
