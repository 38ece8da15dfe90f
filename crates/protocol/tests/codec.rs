//! Properties of the codec: it does not matter where bytes are split, and no bytes do harm.

#![expect(clippy::unwrap_used, reason = "in a test a panic is the message")]

use aether_protocol::codec::{LENGTH_BYTES, encode};
use aether_protocol::limits::FRAME_BYTES_MAX;
use aether_protocol::{
    Cause, Configure, Configured, Decoder, Encoder, EnvVar, Environment, Exited, FromGuest, Hello,
    Output, Request, Run, Stdin, Stream, ToGuest, TtySize, check_request,
};
use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

fn bytes(length: usize) -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..length).prop_map(Bytes::from)
}

fn run() -> impl Strategy<Value = Run> {
    let size = any::<(u32, u32)>().prop_map(|(rows, cols)| TtySize { rows, cols });
    (
        (".*", ".*", vec(".*", 0..8), vec((".*", ".*"), 0..8)),
        (any::<Option<String>>(), any::<u64>(), any::<bool>(), proptest::option::of(size)),
    )
        .prop_map(|((run_id, command, args, env), (cwd, timeout_ms, stdin, tty))| Run {
            run_id,
            command,
            args,
            env: env.into_iter().map(|(name, value)| EnvVar::new(name, value)).collect(),
            cwd,
            timeout_ms,
            stdin,
            tty,
            ..Run::default()
        })
}

fn configure() -> impl Strategy<Value = Configure> {
    let env = proptest::option::of(vec((".*", ".*"), 0..8));
    let texts = (any::<Option<String>>(), any::<Option<String>>(), env);
    let secrets = (bytes(600), proptest::option::of(bytes(64)));
    (texts, secrets, any::<Option<u64>>(), any::<bool>()).prop_map(
        |((hostname, machine_id, env), (entropy, new_token), unix_time_ns, restored)| {
            let var = |(name, value): (String, String)| EnvVar::new(name, value);
            let env = env.map(|vars| Environment { vars: vars.into_iter().map(var).collect() });
            Configure {
                hostname,
                machine_id,
                env,
                unix_time_ns,
                entropy,
                new_token,
                restored,
                ..Configure::default()
            }
        },
    )
}

fn to_guest() -> impl Strategy<Value = ToGuest> {
    prop_oneof![
        (any::<u32>(), any::<u32>(), bytes(64)).prop_map(|(generation, generation_min, token)| {
            Hello { generation, generation_min, token }.into()
        }),
        run().prop_map(|run| Request::from(run).into()),
        configure().prop_map(|configure| Request::from(configure).into()),
        bytes(300).prop_map(|data| Stdin { data }.into()),
        Just(ToGuest::default()),
    ]
}

fn from_guest() -> impl Strategy<Value = FromGuest> {
    prop_oneof![
        (any::<u64>(), bytes(5000)).prop_map(|(offset, data)| {
            Output { stream: Stream::Stderr.into(), offset, data }.into()
        }),
        (vec(".*", 0..4), ".*").prop_map(|(warnings, boot_id)| {
            Configured { warnings, boot_id, kept_open: true, layers: 2 }.into()
        }),
        (any::<Option<i32>>(), any::<Option<i32>>(), any::<u64>()).prop_map(
            |(exit_code, signal, duration_us)| {
                let cause = Cause::Cancelled.into();
                Exited { exit_code, signal, cause, duration_us, ..Exited::default() }.into()
            }
        ),
    ]
}

/// Feeds bytes in pieces of the given lengths, over and over; gives every message.
fn decode_in_pieces<M: prost::Message + Default>(bytes: &[u8], pieces: &[usize]) -> Vec<M> {
    let mut decoder = Decoder::<M>::new();
    let mut messages = Vec::new();
    let mut rest = bytes;
    for piece in pieces.iter().cycle() {
        let (now, later) = rest.split_at(rest.len().min(*piece));
        decoder.push(now);
        while let Some(message) = decoder.next_message().unwrap() {
            messages.push(message);
        }
        rest = later;
        if rest.is_empty() {
            break;
        }
    }
    assert!(decoder.is_at_boundary());
    messages
}

proptest! {
    #[test]
    fn messages_survive_wherever_they_are_split(
        messages in vec(to_guest(), 0..6),
        pieces in vec(1_usize..200, 1..6),
    ) {
        let mut encoder = Encoder::new();
        for message in &messages {
            encoder.push(message).unwrap();
        }
        prop_assert_eq!(decode_in_pieces::<ToGuest>(encoder.pending(), &pieces), messages);
    }

    #[test]
    fn answers_survive_wherever_they_are_split(
        messages in vec(from_guest(), 0..6),
        pieces in vec(1_usize..2000, 1..6),
    ) {
        let mut out = Vec::new();
        for message in &messages {
            encode(message, &mut out).unwrap();
        }
        prop_assert_eq!(decode_in_pieces::<FromGuest>(&out, &pieces), messages);
    }

    #[test]
    fn encoder_gives_every_byte_once(
        messages in vec(to_guest(), 1..5),
        steps in vec(1_usize..50, 1..5),
    ) {
        let (mut encoder, mut whole, mut written) = (Encoder::new(), Vec::new(), Vec::new());
        for (message, step) in messages.iter().zip(steps.iter().cycle()) {
            encoder.push(message).unwrap();
            encode(message, &mut whole).unwrap();
            let step = encoder.pending().len().min(*step);
            written.extend_from_slice(&encoder.pending()[..step]);
            encoder.advance(step);
        }
        written.extend_from_slice(encoder.pending());
        prop_assert_eq!(written, whole);
    }

    #[test]
    fn hostile_bytes_never_panic_and_never_come_back_from_an_error(bytes in vec(any::<u8>(), 0..400)) {
        let mut decoder = Decoder::<ToGuest>::new();
        decoder.push(&bytes);
        let mut has_failed = false;
        for _ in 0..=bytes.len() {
            match decoder.next_message() {
                Ok(Some(message)) => {
                    prop_assert!(!has_failed);
                    drop(format!("{message:?}"));
                }
                Ok(None) => break,
                Err(_) => has_failed = true,
            }
        }
        prop_assert_eq!(has_failed, decoder.next_message().is_err());
    }

    #[test]
    fn hostile_bodies_of_true_length_never_panic(body in vec(any::<u8>(), 0..400)) {
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        let bytes = [&length[..], &body].concat();
        let mut to_guest = Decoder::<ToGuest>::new();
        let mut from_guest = Decoder::<FromGuest>::new();
        to_guest.push(&bytes);
        from_guest.push(&bytes);
        let _ = to_guest.next_message();
        let _ = from_guest.next_message();
    }

    #[test]
    fn bits_that_flip_in_true_messages_never_panic(
        messages in vec(to_guest(), 1..4),
        flips in vec((any::<prop::sample::Index>(), 0_u8..8), 1..6),
    ) {
        let mut bytes = Vec::new();
        for message in &messages {
            encode(message, &mut bytes).unwrap();
        }
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        let mut decoder = Decoder::<ToGuest>::new();
        decoder.push(&bytes);
        while let Ok(Some(_)) = decoder.next_message() {}
    }

    #[test]
    fn checking_a_hostile_run_never_panics(run in run()) {
        let _ = check_request(&aether_protocol::RequestBody::Run(run));
    }

    #[test]
    fn a_length_past_the_limit_is_an_error_before_its_body_comes(
        length in u32::try_from(FRAME_BYTES_MAX + 1).unwrap()..,
    ) {
        let mut decoder = Decoder::<FromGuest>::new();
        decoder.push(&length.to_be_bytes());
        prop_assert!(decoder.next_message().is_err());
        prop_assert!(decoder.buffer(LENGTH_BYTES).capacity() < 4096);
    }
}

#[test]
fn unknown_fields_are_ignored_and_unknown_bodies_are_none() {
    // Field 99 as a varint beside a known field of `Resize`, which is body 6.
    let body = [0x32, 5, 0x08, 24, 0x98, 0x06, 1];
    let mut decoder = Decoder::<ToGuest>::new();
    decoder.push(&[0, 0, 0, 7]);
    decoder.push(&body);
    let message = decoder.next_message().unwrap().unwrap();
    let Some(aether_protocol::ToGuestBody::Resize(resize)) = message.body else { panic!() };
    assert_eq!(resize.rows, 24);
    // Body 15 is nothing yet.
    decoder.push(&[0, 0, 0, 2, 0x7A, 0]);
    assert_eq!(decoder.next_message().unwrap().unwrap(), ToGuest::default());
}
