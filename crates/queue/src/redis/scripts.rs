//! What is done in Redis, each step whole: a script runs alone, and either all of it or none.
//!
//! Memory that is full ends no script half-way: those that make room, or move what is there, say
//! that they may run all the same; the one that takes new entries does not, and is refused before
//! it begins.

use std::{sync::LazyLock, time::Duration};

use aether_redis::{
    MultiplexedConnection,
    redis::{FromRedisValue, RedisResult, Script},
};
use aether_types::Priority;

use crate::share::OWN_RUN_MAX;

const PRELUDE: &str = include_str!("lua/prelude.lua");

/// What a script says of itself in its first line.
#[derive(Debug, Clone, Copy)]
enum May {
    /// Refused when memory is full.
    Grow,
    /// Runs when memory is full too.
    RunWhenFull,
    /// Writes nothing.
    Read,
}

fn script(may: May, body: &str) -> Script {
    let flags = match may {
        May::Grow => "",
        May::RunWhenFull => " flags=allow-oom",
        May::Read => " flags=no-writes",
    };
    let weights: Vec<String> = Priority::ALL.iter().map(|p| p.weight().to_string()).collect();
    let weights = weights.join(", ");
    Script::new(&format!(
        "#!lua{flags}\nlocal WEIGHTS = {{ {weights} }}\nlocal OWN_RUN_MAX = {OWN_RUN_MAX}\n\
         {PRELUDE}\n{body}"
    ))
}

macro_rules! scripts {
    ($($name:ident: $may:ident, $file:literal;)+) => {
        $(pub(super) static $name: LazyLock<Script> =
            LazyLock::new(|| script(May::$may, include_str!($file)));)+
    };
}

scripts! {
    ENQUEUE: Grow, "lua/enqueue.lua";
    CLAIM: RunWhenFull, "lua/claim.lua";
    RENEW: RunWhenFull, "lua/renew.lua";
    COMPLETE: RunWhenFull, "lua/complete.lua";
    RELEASE: RunWhenFull, "lua/release.lua";
    REMOVE: RunWhenFull, "lua/remove.lua";
    SWEEP: RunWhenFull, "lua/sweep.lua";
    RECLAIM: RunWhenFull, "lua/reclaim.lua";
    PROMOTE: RunWhenFull, "lua/promote.lua";
    PASS: RunWhenFull, "lua/pass.lua";
    LEAVE: RunWhenFull, "lua/leave.lua";
    LOOK: Read, "lua/look.lua";
}

/// Runs a script on one connection; `now` is empty where the server's clock counts.
pub(super) async fn run<T: FromRedisValue>(
    script: &Script,
    mut connection: MultiplexedConnection,
    root: &str,
    now: &str,
    values: &[String],
) -> RedisResult<T> {
    let mut call = script.prepare_invoke();
    call.key(root).arg(now);
    for value in values {
        call.arg(value);
    }
    call.invoke_async(&mut connection).await
}

pub(super) fn millis(duration: Duration) -> i64 {
    // Whole numbers in a script are exact up to 2^53.
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).min(1 << 50)
}
