//! Links, addresses, routes and neighbours, as netlink messages; and TAPs.

use std::{
    ffi::CStr,
    fs::{File, OpenOptions},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd as _, BorrowedFd},
};

use rustix::io::Errno;

use super::netlink::{CREATE, EXCLUSIVE, Message, REPLACE, Socket, attributes, u32_at};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_GROUP: u16 = 27;
const IFLA_NET_NS_FD: u16 = 28;
const VETH_INFO_PEER: u16 = 1;
const IFF_UP: u32 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

pub(super) const INFO_BYTES: usize = 16;

pub(super) type Mac = [u8; 6];

fn link_info(index: u32, flags: u32, change: u32) -> [u8; INFO_BYTES] {
    let mut info = [0; INFO_BYTES];
    info[4..8].copy_from_slice(&index.to_ne_bytes());
    info[8..12].copy_from_slice(&flags.to_ne_bytes());
    info[12..16].copy_from_slice(&change.to_ne_bytes());
    info
}

/// One end of a veth pair here, the other in the namespace `peer_in`.
pub(super) fn new_veth(name: &str, mtu: u32, peer: &str, peer_in: BorrowedFd<'_>) -> Message {
    Message::new(RTM_NEWLINK, CREATE | EXCLUSIVE, &link_info(0, 0, 0))
        .attr_text(IFLA_IFNAME, name)
        .attr_u32(IFLA_MTU, mtu)
        .nest(IFLA_LINKINFO, |m| {
            m.attr_text(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, |m| {
                m.nest(VETH_INFO_PEER, |m| {
                    m.raw(&link_info(0, 0, 0))
                        .attr_text(IFLA_IFNAME, peer)
                        .attr_u32(IFLA_MTU, mtu)
                        .attr(IFLA_NET_NS_FD, &peer_in.as_raw_fd().to_ne_bytes())
                })
            })
        })
}

/// The name of a VM's link, as the VM sees it.
const GUEST_LINK: &str = "eth0";

/// The VM's end of a veth pair.
pub(super) struct GuestEnd<'a> {
    pub(super) mac: Mac,
    pub(super) mtu: u32,
    pub(super) netns: BorrowedFd<'a>,
}

/// One end of a veth pair here, with an index of our choice; the other in a VM's namespace.
pub(super) fn new_guest_veth(name: &str, index: u32, guest: &GuestEnd<'_>) -> Message {
    Message::new(RTM_NEWLINK, CREATE | EXCLUSIVE, &link_info(index, 0, 0))
        .attr_text(IFLA_IFNAME, name)
        .attr_u32(IFLA_MTU, guest.mtu)
        .nest(IFLA_LINKINFO, |m| {
            m.attr_text(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, |m| {
                m.nest(VETH_INFO_PEER, |m| {
                    m.raw(&link_info(0, 0, 0))
                        .attr_text(IFLA_IFNAME, GUEST_LINK)
                        .attr(IFLA_ADDRESS, &guest.mac)
                        .attr_u32(IFLA_MTU, guest.mtu)
                        .attr(IFLA_NET_NS_FD, &guest.netns.as_raw_fd().to_ne_bytes())
                })
            })
        })
}

/// Gives a VM's end its address and way out. Runs in the VM's namespace.
pub(super) fn set_up_guest(address: Ipv4Addr, prefix: u8, gateway: Ipv4Addr) -> Result<(), Errno> {
    let mut socket = Socket::open(super::netlink::Family::Route)?;
    let links = links(&mut socket)?;
    let index = |name: &str| links.iter().find(|l| l.name == name).map(|l| l.index);
    let guest = index(GUEST_LINK).ok_or(Errno::NODEV)?;
    let mut messages: Vec<Message> = index("lo").into_iter().map(link_up).collect();
    messages.extend([
        new_address(guest, address, prefix, None),
        link_up(guest),
        new_route(Ipv4Addr::UNSPECIFIED, 0, guest, Some(gateway)),
    ]);
    socket.send_all(messages)
}

pub(super) fn link_up(index: u32) -> Message {
    Message::new(RTM_NEWLINK, 0, &link_info(index, IFF_UP, IFF_UP))
}

/// Brings a TAP up with its address, size and group.
pub(super) fn set_tap(index: u32, mac: Mac, mtu: u32, group: u32) -> Message {
    Message::new(RTM_NEWLINK, 0, &link_info(index, IFF_UP, IFF_UP))
        .attr(IFLA_ADDRESS, &mac)
        .attr_u32(IFLA_MTU, mtu)
        .attr_u32(IFLA_GROUP, group)
}

pub(super) fn set_mtu(index: u32, mtu: u32) -> Message {
    Message::new(RTM_NEWLINK, 0, &link_info(index, 0, 0)).attr_u32(IFLA_MTU, mtu)
}

pub(super) fn delete_link(name: &str) -> Message {
    Message::new(RTM_DELLINK, 0, &link_info(0, 0, 0)).attr_text(IFLA_IFNAME, name)
}

/// Removes all links of a group at once: the kernel's pause for its readers is paid once.
pub(super) fn delete_group(group: u32) -> Message {
    Message::new(RTM_DELLINK, 0, &link_info(0, 0, 0)).attr_u32(IFLA_GROUP, group)
}

fn octets(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(a) => (family(libc::AF_INET), a.octets().to_vec()),
        IpAddr::V6(a) => (family(libc::AF_INET6), a.octets().to_vec()),
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "families are small")]
const fn family(family: libc::c_int) -> u8 {
    family as u8
}

/// `peer`: the other end of a point-to-point link; otherwise the address itself.
pub(super) fn new_address(
    index: u32,
    address: impl Into<IpAddr>,
    prefix: u8,
    peer: Option<Ipv4Addr>,
) -> Message {
    let address = address.into();
    let (family, local) = octets(address);
    let scope = if address.is_ipv6() { RT_SCOPE_LINK } else { RT_SCOPE_UNIVERSE };
    let mut fixed = [family, prefix, 0, scope, 0, 0, 0, 0];
    fixed[4..].copy_from_slice(&index.to_ne_bytes());
    let other = peer.map_or_else(|| local.clone(), |p| p.octets().to_vec());
    Message::new(RTM_NEWADDR, CREATE | REPLACE, &fixed)
        .attr(IFA_LOCAL, &local)
        .attr(IFA_ADDRESS, &other)
        .attr_u32(IFA_FLAGS, IFA_F_NODAD)
}

pub(super) fn new_route(
    to: Ipv4Addr,
    prefix: u8,
    index: u32,
    gateway: Option<Ipv4Addr>,
) -> Message {
    let scope = if gateway.is_some() { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK };
    let (table, kind) = (RT_TABLE_MAIN, RTN_UNICAST);
    let fixed =
        [family(libc::AF_INET), prefix, 0, 0, table, RTPROT_STATIC, scope, kind, 0, 0, 0, 0];
    let mut message = Message::new(RTM_NEWROUTE, CREATE | REPLACE, &fixed).attr_u32(RTA_OIF, index);
    if prefix > 0 {
        message = message.attr(RTA_DST, &to.octets());
    }
    match gateway {
        Some(gateway) => message.attr(RTA_GATEWAY, &gateway.octets()),
        None => message,
    }
}

/// An entry that the other side cannot change.
pub(super) fn new_neighbour(index: u32, address: impl Into<IpAddr>, mac: Mac) -> Message {
    let (family, address) = octets(address.into());
    let mut fixed = [0; 12];
    fixed[0] = family;
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    Message::new(RTM_NEWNEIGH, CREATE | REPLACE, &fixed)
        .attr(NDA_DST, &address)
        .attr(NDA_LLADDR, &mac)
}

#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mtu: u32,
}

pub(super) fn links(socket: &mut Socket) -> Result<Vec<Link>, Errno> {
    let answers = socket.dump(RTM_GETLINK, &link_info(0, 0, 0))?;
    Ok(answers.iter().filter_map(|bytes| parse_link(bytes)).collect())
}

fn parse_link(bytes: &[u8]) -> Option<Link> {
    let index = u32_at(bytes, 4)?;
    let (mut name, mut mtu) = (None, 0);
    for (kind, value) in attributes(bytes, INFO_BYTES) {
        match kind {
            IFLA_IFNAME => name = Some(text(value)?),
            IFLA_MTU => mtu = u32_at(value, 0)?,
            _ => {}
        }
    }
    Some(Link { index, name: name?, mtu })
}

pub(super) fn text(value: &[u8]) -> Option<String> {
    Some(CStr::from_bytes_until_nul(value).ok()?.to_str().ok()?.to_owned())
}

/// An address of this host, or a network that it has a route to.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) address: Ipv4Addr,
    pub(super) prefix: u8,
    /// Of the link; 0 where there is none.
    pub(super) index: u32,
}

pub(super) fn addresses(socket: &mut Socket) -> Result<Vec<Known>, Errno> {
    let answers = socket.dump(RTM_GETADDR, &[family(libc::AF_INET), 0, 0, 0, 0, 0, 0, 0])?;
    Ok(answers.iter().filter_map(|bytes| parse_address(bytes)).collect())
}

fn parse_address(bytes: &[u8]) -> Option<Known> {
    let local = attributes(bytes, 8).find(|(kind, _)| *kind == IFA_LOCAL)?.1;
    let address = Ipv4Addr::from(*local.first_chunk()?);
    Some(Known { address, prefix: *bytes.get(1)?, index: u32_at(bytes, 4)? })
}

/// Of every table. The default route has prefix 0.
pub(super) fn routes(socket: &mut Socket) -> Result<Vec<Known>, Errno> {
    let mut fixed = [0; 12];
    fixed[0] = family(libc::AF_INET);
    let answers = socket.dump(RTM_GETROUTE, &fixed)?;
    Ok(answers.iter().filter_map(|bytes| parse_route(bytes)).collect())
}

fn parse_route(bytes: &[u8]) -> Option<Known> {
    let mut known = Known { address: Ipv4Addr::UNSPECIFIED, prefix: *bytes.get(1)?, index: 0 };
    for (kind, value) in attributes(bytes, 12) {
        match kind {
            RTA_DST => known.address = Ipv4Addr::from(*value.first_chunk()?),
            RTA_OIF => known.index = u32_at(value, 0)?,
            _ => {}
        }
    }
    Some(known)
}

pub(super) const CHANNEL_HOST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
pub(super) const CHANNEL_GUEST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// Of the host's side of every link to a guest, so that a clone finds what its template knew.
pub(super) const MAC_HOST: Mac = [0x02, 0xae, 0, 0, 0, 1];
pub(super) const MAC_CHANNEL_GUEST: Mac = [0x02, 0xae, 0, 0, 0, 2];

pub(super) fn guest_mac(address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = address.octets();
    [0x02, 0xae, a, b, c, d]
}

pub(super) fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb;
const TUNSETOWNER: libc::Ioctl = 0x4004_54cc;
const TUNSETIFINDEX: libc::Ioctl = 0x4004_54da;
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;
const IFF_PERSIST: u16 = 0x0800;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

/// Opens a TAP of this thread's namespace by name, making it where there is none.
pub(super) fn open_tap(name: &str, index: Option<u32>) -> Result<File, Errno> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    let mut request = InterfaceRequest {
        name: [0; libc::IFNAMSIZ],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    // The last byte stays zero.
    let length = name.len().min(libc::IFNAMSIZ - 1);
    request.name[..length].copy_from_slice(&name.as_bytes()[..length]);
    if let Some(index) = index {
        tun_ioctl(&file, TUNSETIFINDEX, (&raw const index).addr())?;
    }
    tun_ioctl(&file, TUNSETIFF, (&raw const request).addr())?;
    Ok(file)
}

/// Opens a TAP that was made by [`make_tap`]: one that is not there is not made.
pub(super) fn open_made_tap(name: &str) -> Result<File, Errno> {
    let file = open_tap(name, None)?;
    let mut request = InterfaceRequest { name: [0; libc::IFNAMSIZ], flags: 0, rest: [0; 22] };
    tun_ioctl(&file, TUNGETIFF, (&raw mut request).addr())?;
    // One made just now ends with its descriptor.
    if request.flags & IFF_PERSIST == 0 { Err(Errno::NODEV) } else { Ok(file) }
}

/// Makes a TAP that stays when its maker ends and that `owner_uid` may open by name. Its index is
/// chosen here, so that what refers to it can be sent without asking for it.
pub(super) fn make_tap(name: &str, index: u32, owner_uid: u32) -> Result<(), Errno> {
    let file = match open_tap(name, Some(index)) {
        Ok(file) => file,
        // A VMM has it open: it is there, and as it was made.
        Err(Errno::BUSY) => return Ok(()),
        Err(errno) => return Err(errno),
    };
    tun_ioctl(&file, TUNSETOWNER, owner_uid as usize)?;
    tun_ioctl(&file, TUNSETPERSIST, 1)
}

#[expect(unsafe_code, reason = "no wrapper for the ioctls of tun")]
fn tun_ioctl(file: &File, request: libc::Ioctl, argument: usize) -> Result<(), Errno> {
    // SAFETY: the argument is a number, or the address of a value that outlives the call and has
    // the size and layout that the request asks for (checked at the places that call this).
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if result < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(())
}
