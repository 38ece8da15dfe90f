//! PID 1 of a guest or of a container, and for tests a plain server on a Unix socket.

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(directory) = aether_agent::container::wanted(std::env::args_os().skip(1)) {
        return aether_agent::container::main(&directory);
    }
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
