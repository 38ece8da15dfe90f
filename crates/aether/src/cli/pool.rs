//! `aether pool`.

use aether_api::PoolView;

use super::{connect, table};
use crate::{
    args::{Global, Pool},
    exit::Exit,
    failure::Failure,
    output,
};

pub(crate) async fn run(global: &Global, command: Pool) -> Result<Exit, Failure> {
    let client = connect(global)?;
    match command {
        Pool::List => {
            let pools = client.pools().await?;
            if global.json {
                output::json(&pools);
            } else if pools.items.is_empty() {
                output::note("there are no pools; `aether up --pool TEMPLATE=MIN` keeps one");
            } else {
                print(pools.items);
            }
        }
    }
    Ok(Exit::Success)
}

fn print(pools: Vec<PoolView>) {
    let row = |pool: PoolView| {
        let counts = [pool.ready, pool.target, pool.min, pool.max].map(|n| n.to_string());
        let uses = [pool.hits, pool.misses].map(|n| n.to_string());
        std::iter::once(pool.template).chain(counts).chain(uses).collect()
    };
    table::print(
        &["TEMPLATE", "READY", "TARGET", "MIN", "MAX", "HITS", "MISSES"],
        pools.into_iter().map(row).collect(),
    );
}
