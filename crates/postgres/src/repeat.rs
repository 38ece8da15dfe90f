//! Doing again what the server undid, or what a lost connection kept from it.

use std::time::Duration;

use crate::Trouble;

/// Tries of one call. Transactions lock in one order, so that the second nearly always does it.
const TRIES_MAX: u32 = 6;

/// Before the second try where others were in the way; it doubles.
const PAUSE_CONFLICT: Duration = Duration::from_millis(5);

/// Before the second try where the server went away; it doubles. A server that was restarted is
/// back within a second or so, and nothing tells when.
const PAUSE_LOST: Duration = Duration::from_millis(40);

/// Calls `once` again while `trouble` says that it was undone, or that the connection was lost
/// before it was done. What must not be done twice has to say another trouble.
pub async fn repeated<T, E, F>(
    mut once: impl FnMut() -> F,
    trouble: impl Fn(&E) -> Trouble,
) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let (mut conflict, mut lost) = (PAUSE_CONFLICT, PAUSE_LOST);
    for _ in 1..TRIES_MAX {
        let answer = once().await;
        let Err(error) = &answer else { return answer };
        match trouble(error) {
            Trouble::Conflict => {
                tokio::time::sleep(conflict).await;
                conflict *= 2;
            }
            Trouble::Lost => {
                tokio::time::sleep(lost).await;
                lost *= 2;
            }
            Trouble::Busy | Trouble::Other => return answer,
        }
    }
    once().await
}
