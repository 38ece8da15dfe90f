//! See the library of the same name; nothing happens here.

use std::process::ExitCode;

fn main() -> ExitCode {
    aether::main()
}
