//! `aether shell`: a terminal in a VM.

use std::io::IsTerminal as _;

use aether_api::TerminalControl;
use aether_types::TtySize;
use bytes::Bytes;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc::{Sender, channel},
};

use super::{
    attach::{self, Sink},
    connect, stdin,
    terminal::{self, Escape, RawTerminal},
};
use crate::{
    args::{Global, Shell},
    exit::Exit,
    failure::Failure,
    output,
    signals::Signals,
};

pub(crate) async fn run(global: &Global, args: Shell) -> Result<Exit, Failure> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        return Err(Failure::usage("shell needs a terminal").hint("`aether exec` needs none"));
    }
    let client = connect(global)?;
    let mut start = attach::start(args.options, args.command);
    let (rows, cols) = terminal::size();
    start.tty = Some(TtySize { rows, cols });
    if let Some(term) = term() {
        start.env.entry("TERM".to_owned()).or_insert(term);
    }
    attach::check(&start)?;
    let mut signals = Signals::take()?;
    let (mut sink, source) = attach::open(&client, &args.vm, &start).await?;
    let (control, controls) = channel(1);
    let (typed, data) = channel(1);
    let raw = RawTerminal::enter()?;
    let outcome = tokio::select! {
        outcome = attach::follow(source, Sink::Streams) => outcome,
        () = keys(typed) => Ok(Exit::Success),
        outcome = resizes(control) => outcome,
        // From elsewhere: keys do not make signals on a raw terminal. The guest's side hangs up.
        signal = signals.next() => Ok(Exit::Command(128 + u8::try_from(signal).unwrap_or(0))),
        () = attach::feed(&mut sink, data, controls) => unreachable!("it never returns"),
    };
    drop(raw);
    drop(sink);
    if matches!(outcome, Ok(Exit::Success)) {
        return outcome;
    }
    // Whatever the guest wrote last, the next line begins at the left.
    if outcome.is_err() {
        output::note("");
    }
    outcome
}

/// Returns when the user asks to leave.
async fn keys(sender: Sender<Bytes>) {
    let mut escape = Escape::new();
    let mut typed = stdin::read();
    while let Some(bytes) = typed.recv().await {
        let (out, leave) = escape.pass(&bytes);
        if !out.is_empty() && sender.send(Bytes::from(out)).await.is_err() {
            break;
        }
        if leave {
            return;
        }
    }
    // The terminal is gone, and with it whoever typed.
}

/// Never returns but with an error.
async fn resizes(control: Sender<TerminalControl>) -> Result<Exit, Failure> {
    let mut changes = signal(SignalKind::window_change())
        .map_err(|e| Failure::io("listen for changes of the window", &e))?;
    loop {
        changes.recv().await;
        let (rows, cols) = terminal::size();
        let _ = control.send(TerminalControl::Resize { rows, cols }).await;
    }
}

#[expect(clippy::disallowed_methods, reason = "this crate reads the environment")]
fn term() -> Option<String> {
    std::env::var("TERM").ok()
}
