//! Reading a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::fs::OpenOptionsExt as _;

use aether_protocol::codec::DataHeader;
use aether_protocol::limits::DATA_BYTES_MAX;
use aether_protocol::{End, ErrorCode, Failed, FileStat, ReadFile};
use rustix::io::{Errno, pread};

use super::{act_as, describe};
use crate::conn::Conn;
use crate::error::Fail;

pub(crate) fn read(mut conn: Conn, request: &ReadFile) {
    match open(request) {
        Ok((file, stat)) => {
            let length = stat.size;
            conn.queue(stat);
            match send(&mut conn, &file, length, request) {
                Ok(Ok(())) => conn.queue(End {}),
                Ok(Err(fail)) => conn.queue(Failed::from(fail)),
                Err(_host_is_gone) => return,
            }
        }
        Err(fail) => conn.queue(Failed::from(fail)),
    }
    conn.finish();
}

fn open(request: &ReadFile) -> Result<(File, FileStat), Fail> {
    act_as(request.user.as_deref())?;
    let path = &request.path;
    // Without blocking: a named pipe would wait for its writer.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(Fail::io(format!("open {path}")))?;
    let metadata = file.metadata().map_err(Fail::io(format!("look at {path}")))?;
    if metadata.is_dir() {
        return Err(Fail::new(ErrorCode::IsADirectory, format!("{path} is a directory")));
    }
    if !metadata.is_file() {
        return Err(Fail::new(ErrorCode::NotAFile, format!("{path} is not a file")));
    }
    Ok((file, describe(&metadata)))
}

/// Sends a file that had this length when it was opened; what it has grown by since comes too, and
/// files of the kernel, which have no length. The outer error is the host's, the inner the file's.
fn send(
    conn: &mut Conn,
    file: &File,
    length: u64,
    request: &ReadFile,
) -> io::Result<Result<(), Fail>> {
    let mut at = request.offset;
    let mut left = request.limit.unwrap_or(u64::MAX);
    while left > 0 {
        let limit = usize::try_from(left).unwrap_or(usize::MAX).min(DATA_BYTES_MAX);
        // While the file is as long as it was, its pages go to the socket without a copy.
        let sure = usize::try_from(length.saturating_sub(at)).unwrap_or(usize::MAX).min(limit);
        if sure > 0 {
            if conn.send_from_file(DataHeader::data(sure), file, at, sure)? < sure {
                let message = format!("{} has become shorter", request.path);
                return Ok(Err(Fail::new(ErrorCode::Io, message)));
            }
            at += sure as u64;
            left -= sure as u64;
            continue;
        }
        let fill = |space: &mut [MaybeUninit<u8>]| match pread(file, space, at) {
            Ok((got, _)) => Ok(got.len()),
            // Past what an offset can be there is nothing.
            Err(Errno::INVAL | Errno::OVERFLOW) if i64::try_from(at).is_err() => Ok(0),
            Err(errno) => Err(errno),
        };
        match conn.queue_data(limit, DataHeader::data, fill) {
            Ok(0) => break,
            Ok(length) => {
                at += length as u64;
                left -= length as u64;
                conn.flush_all()?;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Ok(Err(Fail::sys(format!("read {}", request.path))(errno))),
        }
    }
    Ok(Ok(()))
}
