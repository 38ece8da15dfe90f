//! The least that can run a command, or move a file, for someone outside the guest: no frames, no
//! limits, no security. Benchmarks measure the platform against it, in the same guest and over the
//! same channel.
//!
//! A connection is one line of words parted by tabs, `x ARG...`, `r PATH` or `w PATH BYTES`, and then: the command's output
//! up to the end of file; the file's bytes; or the file's bytes to us and `ok` back.
#![expect(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a tool of the benchmarks, without a log"
)]

use std::{
    fs::File,
    io::{self, BufRead as _, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Command, Stdio},
    thread,
};

const PORT: u16 = 2000;
const BUFFER_BYTES: usize = 64 * 1024;

fn main() -> io::Result<()> {
    let listener = TcpListener::bind(("::", PORT))?;
    println!("listening");
    for connection in listener.incoming() {
        let connection = connection?;
        thread::spawn(move || {
            if let Err(error) = serve(connection) {
                eprintln!("bare agent: {error}");
            }
        });
    }
    Ok(())
}

fn serve(mut connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, connection.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let words: Vec<&str> = line.trim_end_matches('\n').split('\t').collect();
    match words.as_slice() {
        ["x", program, args @ ..] => {
            let mut child = Command::new(program)
                .args(args)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()?;
            if let Some(mut output) = child.stdout.take() {
                copy(&mut output, &mut connection)?;
            }
            child.wait()?;
        }
        ["r", path] => copy(&mut File::open(path)?, &mut connection)?,
        ["w", path, bytes] => {
            let bytes = bytes.parse().map_err(io::Error::other)?;
            copy(&mut reader.take(bytes), &mut File::create(path)?)?;
            connection.write_all(b"ok")?;
        }
        _ => return Err(io::Error::other("an unknown line")),
    }
    Ok(())
}

/// With read and write alone, as a simple program would.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer)? {
            0 => return to.flush(),
            count => to.write_all(&buffer[..count])?,
        }
    }
}
