//! PID 1 of a guest, and for tests a plain server on a Unix socket.

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        aether_agent::init::main()
    }
    match aether_agent::serve_for_tests(std::env::args_os().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            aether_agent::kmsg!("{error}");
            ExitCode::FAILURE
        }
    }
}
