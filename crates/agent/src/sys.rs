//! The calls that neither std nor rustix has in a safe form.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::time::Duration;

use aether_protocol::codec::{DATA_HEADER_BYTES_MAX, DataHeader};
use bytes::{BufMut as _, BytesMut};
use rustix::io::Errno;

use crate::users::User;

/// Lets `read` fill the spare room of a buffer and appends what it says it wrote.
#[expect(unsafe_code, reason = "a read into memory that need not be zeroed first")]
pub(crate) fn append<E>(
    buffer: &mut BytesMut,
    read: impl FnOnce(&mut [MaybeUninit<u8>]) -> Result<usize, E>,
) -> Result<usize, E> {
    // SAFETY: the slice is only handed on as uninitialised, and nothing de-initialises it: `read`
    // gets it as `MaybeUninit`, which has no way to tell what was there before.
    let space = unsafe { buffer.chunk_mut().as_uninit_slice_mut() };
    let room = space.len();
    let length = read(space)?.min(room);
    // SAFETY: the system call has written `length` bytes, which is at most the room.
    unsafe { buffer.advance_mut(length) };
    Ok(length)
}

/// Appends a data frame whose payload `fill` writes in its place, so that it is not copied.
///
/// Gives the length of the payload, and how many bytes at the start of an empty `out` are padding:
/// the header's length depends on the payload's, so the payload is read behind the longest header
/// and the header is put right before it. Behind other frames padding cannot be skipped, and the
/// payload moves instead.
#[expect(unsafe_code, reason = "a read into memory that need not be zeroed first")]
pub(crate) fn append_with_header<E>(
    out: &mut Vec<u8>,
    limit: usize,
    header: impl FnOnce(usize) -> DataHeader,
    fill: impl FnOnce(&mut [MaybeUninit<u8>]) -> Result<usize, E>,
) -> Result<(usize, usize), E> {
    const PAYLOAD: usize = DATA_HEADER_BYTES_MAX;
    let start = out.len();
    out.reserve(PAYLOAD + limit);
    let space = &mut out.spare_capacity_mut()[..PAYLOAD + limit];
    let length = fill(&mut space[PAYLOAD..])?.min(limit);
    if length == 0 {
        return Ok((0, 0));
    }
    let header = header(length);
    let bytes = header.as_slice();
    let gap = PAYLOAD - bytes.len();
    let header_at = if start == 0 { gap } else { 0 };
    for byte in &mut space[..header_at] {
        byte.write(0);
    }
    for (to, from) in space[header_at..].iter_mut().zip(bytes) {
        to.write(*from);
    }
    let payload_at = header_at + bytes.len();
    if payload_at != PAYLOAD {
        space.copy_within(PAYLOAD..PAYLOAD + length, payload_at);
    }
    // SAFETY: everything up to the end of the payload was written: padding, header, payload.
    unsafe { out.set_len(start + payload_at + length) };
    Ok((length, header_at))
}

/// `kill(2)`; a negative id is a process group. The outcome matters to nobody: whoever is gone
/// needs no signal.
#[expect(unsafe_code, reason = "any signal number may be asked for")]
pub(crate) fn kill(pid: i32, signal: i32) {
    // SAFETY: takes two numbers.
    unsafe { libc::kill(pid, signal) };
}

/// Gives the calling thread the user's rights on files, for the rest of its life.
///
/// The raw calls change one thread; the C library's would change the whole process. Leaving user 0
/// also takes the capabilities that override permissions.
#[expect(unsafe_code, reason = "credentials of one thread")]
pub(crate) fn become_file_user(user: &User) -> io::Result<()> {
    if user.uid == 0 && user.gid == 0 && user.groups.is_empty() {
        return Ok(());
    }
    // SAFETY: the pointer and the count describe one live slice; the rest are numbers.
    unsafe {
        if libc::syscall(libc::SYS_setgroups, user.groups.len(), user.groups.as_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        libc::syscall(libc::SYS_setfsgid, user.gid);
        libc::syscall(libc::SYS_setfsuid, user.uid);
        // These two report only the id from before, so the new one is read back.
        let gid = libc::syscall(libc::SYS_setfsgid, -1);
        let uid = libc::syscall(libc::SYS_setfsuid, -1);
        if gid != i64::from(user.gid) || uid != i64::from(user.uid) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
    }
    Ok(())
}

/// One memory arena for all threads: an arena for each costs every connection several system calls.
#[expect(unsafe_code, reason = "no safe form")]
pub(crate) fn use_one_arena() {
    // SAFETY: sets a number.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Undoes what whoever started this process ignores, because commands would ignore it too.
/// `SIGPIPE` stays ignored here, as std has it, and is restored for each command.
#[expect(unsafe_code, reason = "no safe form")]
pub(crate) fn stop_ignoring_signals() {
    for signal in (1..=libc::SIGSYS).filter(|&signal| signal != libc::SIGPIPE) {
        // SAFETY: plain calls on a local value; a handler that somebody has set is left alone.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let read = libc::sigaction(signal, std::ptr::null(), &raw mut action);
            if read == 0 && action.sa_sigaction == libc::SIG_IGN {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}

/// Keeps from commands whatever descriptors this process was started with.
#[expect(unsafe_code, reason = "no safe form")]
pub(crate) fn keep_descriptors_private() {
    // SAFETY: sets a flag on descriptors and closes none.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
}

/// Makes the kernel see a part of a block device as a device of its own.
#[expect(unsafe_code, reason = "an ioctl of block devices")]
pub(crate) fn add_partition(
    device: BorrowedFd<'_>,
    number: usize,
    offset: u64,
    length: u64,
) -> Result<(), Errno> {
    const BLKPG: libc::c_ulong = 0x1269;
    const ADD_PARTITION: libc::c_int = 1;
    #[repr(C)]
    struct Partition {
        start: i64,
        length: i64,
        number: libc::c_int,
        names: [u8; 128],
    }
    #[repr(C)]
    struct Argument {
        operation: libc::c_int,
        flags: libc::c_int,
        data_length: libc::c_int,
        data: *mut Partition,
    }
    let mut partition = Partition {
        start: i64::try_from(offset).map_err(|_| Errno::INVAL)?,
        length: i64::try_from(length).map_err(|_| Errno::INVAL)?,
        number: libc::c_int::try_from(number).map_err(|_| Errno::INVAL)?,
        names: [0; 128],
    };
    let argument = Argument {
        operation: ADD_PARTITION,
        flags: 0,
        data_length: libc::c_int::try_from(size_of::<Partition>()).map_err(|_| Errno::INVAL)?,
        data: &raw mut partition,
    };
    // SAFETY: the kernel reads both structures, which live until it returns.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKPG, &raw const argument) };
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// Credits entropy and has the kernel's generator take it at once.
#[expect(unsafe_code, reason = "ioctls of the random device")]
pub(crate) fn reseed(random: BorrowedFd<'_>, entropy: &[u8]) -> io::Result<()> {
    const RND_ADD_ENTROPY: libc::c_ulong = 0x4008_5203;
    const RND_RESEED_CRNG: libc::c_ulong = 0x5207;
    let length = i32::try_from(entropy.len()).map_err(io::Error::other)?;
    // struct rand_pool_info: entropy in bits, length, bytes.
    let mut info = Vec::with_capacity(entropy.len() + 8);
    info.extend_from_slice(&(length * 8).to_ne_bytes());
    info.extend_from_slice(&length.to_ne_bytes());
    info.extend_from_slice(entropy);
    // SAFETY: `info` has the two numbers and as many bytes as the second says.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RND_ADD_ENTROPY, info.as_ptr()) };
    if added != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RND_RESEED_CRNG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Writes an ext4 file system's journal out to where it belongs and has its room given back, or,
/// where the disk cannot do that, filled with zeros. `folder` is any on it.
#[expect(unsafe_code, reason = "an ioctl of ext4")]
pub(crate) fn empty_journal(folder: BorrowedFd<'_>) -> io::Result<()> {
    const EXT4_IOC_CHECKPOINT: libc::c_ulong = 0x4004_662b;
    const DISCARD: u32 = 1;
    const ZERO: u32 = 2;
    let checkpoint = |flag: u32| {
        // SAFETY: reads one number of 32 bits.
        let result =
            unsafe { libc::ioctl(folder.as_raw_fd(), EXT4_IOC_CHECKPOINT, &raw const flag) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    match checkpoint(DISCARD) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => checkpoint(ZERO),
        result => result,
    }
}

/// `sockaddr_vm`, which rustix does not have.
fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK.cast_unsigned().try_into().unwrap_or_default(),
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: cid,
        svm_zero: [0; 4],
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the size of a small struct")]
const VSOCK_ADDRESS_BYTES: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

#[expect(unsafe_code, reason = "no safe form of vsock")]
fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: takes numbers and gives a new descriptor, which nobody else owns.
    unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Listens on a vsock port of this guest.
#[expect(unsafe_code, reason = "no safe form of vsock")]
pub(crate) fn listen_vsock(port: u32, backlog: i32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is live and has the length that is given.
    let bound = unsafe {
        let address = (&raw const address).cast();
        libc::bind(socket.as_raw_fd(), address, VSOCK_ADDRESS_BYTES) == 0
            && libc::listen(socket.as_raw_fd(), backlog) == 0
    };
    if bound { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

/// Connects to a vsock port of the host.
#[expect(unsafe_code, reason = "no safe form of vsock")]
pub(crate) fn connect_to_host(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    let address = vsock_address(libc::VMADDR_CID_HOST, port);
    // SAFETY: the address is live and has the length that is given.
    let connected = unsafe {
        libc::connect(socket.as_raw_fd(), (&raw const address).cast(), VSOCK_ADDRESS_BYTES)
    };
    if connected == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

/// Accepts a vsock connection; one that is not the host's is closed and reported as not permitted.
#[expect(unsafe_code, reason = "no safe form of vsock")]
pub(crate) fn accept_from_host(listener: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    let mut peer = vsock_address(0, 0);
    let mut length = VSOCK_ADDRESS_BYTES;
    // SAFETY: the address is live, writable and has the length that is given; the descriptor is new.
    let socket = unsafe {
        let peer = (&raw mut peer).cast();
        let flags = libc::SOCK_CLOEXEC;
        let fd = libc::accept4(listener.as_raw_fd(), peer, &raw mut length, flags);
        if fd < 0 {
            let error = io::Error::last_os_error();
            return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
        }
        OwnedFd::from_raw_fd(fd)
    };
    if peer.svm_cid == libc::VMADDR_CID_HOST { Ok(socket) } else { Err(Errno::PERM) }
}

/// Forks a process of one thread; 0 is the child.
#[expect(unsafe_code, reason = "no safe form of fork")]
pub(crate) fn fork() -> io::Result<i32> {
    // SAFETY: only PID 1 calls this, and it has one thread, so the child has all that it needs.
    let pid = unsafe { libc::fork() };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid) }
}

/// Waits for any child to end and collects it; `None` where there is none.
#[expect(unsafe_code, reason = "any child, orphans included")]
pub(crate) fn wait_any() -> Option<(i32, i32)> {
    loop {
        let mut status = 0;
        // SAFETY: the status is live and writable.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if pid > 0 {
            return Some((pid, status));
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return None;
        }
    }
}

/// Blocks every signal that can be blocked, for PID 1; or none, for its child.
#[expect(unsafe_code, reason = "no safe form")]
pub(crate) fn set_all_signals_blocked(is_blocked: bool) {
    // SAFETY: plain calls on a local set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        if is_blocked {
            libc::sigfillset(&raw mut set);
        } else {
            libc::sigemptyset(&raw mut set);
        }
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

/// Ties a socket to one network device.
#[expect(unsafe_code, reason = "no safe form")]
pub(crate) fn bind_to_device(socket: &OwnedFd, name: &str) -> io::Result<()> {
    let length = libc::socklen_t::try_from(name.len()).map_err(io::Error::other)?;
    // SAFETY: the name is live and has the length that is given.
    let set = unsafe {
        let (level, option) = (libc::SOL_SOCKET, libc::SO_BINDTODEVICE);
        libc::setsockopt(socket.as_raw_fd(), level, option, name.as_ptr().cast(), length)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has a listener give out connections with their first bytes, or after this time.
#[expect(unsafe_code, reason = "no safe form")]
pub(crate) fn defer_accept(socket: &OwnedFd, limit: Duration) -> io::Result<()> {
    let seconds = libc::c_int::try_from(limit.as_secs()).map_err(io::Error::other)?;
    // SAFETY: the number is live and has the length that is given.
    let set = unsafe {
        let (level, option) = (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT);
        let length = size_of::<libc::c_int>().try_into().unwrap_or_default();
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const seconds).cast(), length)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The MAC of a network device; any socket will do.
#[expect(unsafe_code, reason = "no safe form")]
pub(crate) fn mac_of(socket: BorrowedFd<'_>, device: &str) -> Option<[u8; 6]> {
    // SAFETY: a plain structure, for which zeros are fine.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let (_zero, room) = request.ifr_name.split_last_mut()?;
    for (to, from) in room.get_mut(..device.len())?.iter_mut().zip(device.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the kernel writes into the structure that it is given, and on success it has written
    // the union's address.
    let address = unsafe {
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) != 0 {
            return None;
        }
        request.ifr_ifru.ifru_hwaddr.sa_data
    };
    let bytes = address.map(i8::cast_unsigned);
    bytes.first_chunk().copied()
}
