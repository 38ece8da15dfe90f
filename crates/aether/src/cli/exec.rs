//! `aether exec`: a command in a VM, as if it ran here.

use aether_api::TerminalControl;
use bytes::Bytes;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::{
    attach::{self, Sink},
    connect, stdin,
};
use crate::{
    args::{Exec, Global},
    exit::Exit,
    failure::Failure,
    output,
    signals::Signals,
};

/// After so many signals we go without waiting for the command.
const SIGNALS_MAX: u32 = 3;

pub(crate) async fn run(global: &Global, args: Exec) -> Result<Exit, Failure> {
    let client = connect(global)?;
    let start = attach::start(args.options, args.command);
    attach::check(&start)?;
    // Before the command runs, so that none of them is lost.
    let signals = Signals::take()?;
    let (mut sink, source) = attach::open(&client, &args.vm, &start).await?;
    let (control, controls) = channel(usize::try_from(SIGNALS_MAX).unwrap_or(1));
    let form = if global.json { Sink::Json } else { Sink::Streams };
    let outcome = tokio::select! {
        outcome = attach::follow(source, form) => outcome,
        signal = forward_signals(signals, control) => {
            output::note("aether: the command does not end; it is left to the server to end it");
            Ok(Exit::Command(128 + u8::try_from(signal).unwrap_or(0)))
        }
        () = attach::feed(&mut sink, input(args.no_stdin), controls) => {
            unreachable!("it never returns")
        }
    };
    // The command has ended, or is to end: the server hears of it at once, and we do not wait.
    drop(sink);
    outcome
}

/// Answers with the last signal once there were too many.
async fn forward_signals(mut signals: Signals, control: Sender<TerminalControl>) -> i32 {
    for _ in 1..SIGNALS_MAX {
        let signal = signals.next().await;
        // There is room for all of them; nobody takes them only once the connection is gone.
        let _ = control.try_send(TerminalControl::Signal { signal });
    }
    signals.next().await
}

fn input(none: bool) -> Receiver<Bytes> {
    // Without its sender a channel is at its end.
    if none { channel(1).1 } else { stdin::read() }
}
