//! The gateway over a real store, a real queue and real connections; the worker and the guest are
//! scripted.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on is to say where")]

mod audit;
mod bounds;
mod docs;
mod events;
mod files;
mod guest;
mod jwt;
mod keys;
mod limits;
mod logs;
mod openapi;
mod outbox;
mod quotas;
mod refusals;
mod requests;
mod rig;
mod snapshots;
mod streams;
mod templates;
mod tenants;
mod terminal;
mod tools;
mod worker;
mod workers;
