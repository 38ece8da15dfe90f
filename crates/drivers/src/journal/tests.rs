use proptest::prelude::*;

use super::*;

fn tap(name: &str) -> Resource {
    Resource::Tap { name: name.to_owned() }
}

#[test]
fn what_was_written_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let (vm, other) = (MachineId::new(), MachineId::new());
    {
        let journal = Journal::open(&path).unwrap();
        journal.intend(vm, &tap("a")).unwrap();
        journal.intend(vm, &tap("b")).unwrap();
        journal.intend(Owner::Host, &tap("c")).unwrap();
        journal.set_machine(vm, serde_json::json!({"token": "t"})).unwrap();
        journal.forget(vm, &tap("a")).unwrap();
        journal.intend(other, &tap("d")).unwrap();
        journal.forget_owner(other).unwrap();
    }
    let journal = Journal::open(&path).unwrap();
    assert_eq!(journal.machines(), [vm]);
    assert_eq!(journal.resources(vm), [tap("b")]);
    assert_eq!(journal.resources(Owner::Host), [tap("c")]);
    assert_eq!(journal.machine(vm).unwrap()["token"], "t");
    assert!(journal.resources(other).is_empty());
}

#[test]
fn a_second_opener_is_told_who_holds_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let journal = Journal::open(&path).unwrap();
    let error = Journal::open(&path).unwrap_err();
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    drop(journal);
    Journal::open(&path).unwrap();
}

#[test]
fn only_the_owner_may_read_it() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let journal = Journal::open(&path).unwrap();
    journal.intend(Owner::Host, &tap("a")).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn damage_in_the_middle_keeps_the_rest_aside() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let journal = Journal::open(&path).unwrap();
    for name in ["a", "b", "c"] {
        journal.intend(Owner::Host, &tap(name)).unwrap();
    }
    drop(journal);
    let mut bytes = std::fs::read(&path).unwrap();
    let second = bytes.iter().position(|b| *b == b'\n').unwrap() + 1;
    bytes[second] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let journal = Journal::open(&path).unwrap();
    assert_eq!(journal.resources(Owner::Host), [tap("a")]);
    assert_eq!(std::fs::read(dir.path().join("journal.damaged")).unwrap(), bytes[second..]);
}

#[test]
fn a_long_history_is_compacted_while_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let journal = Journal::open(&path).unwrap();
    journal.intend(Owner::Host, &tap("kept")).unwrap();
    for _ in 0..20_000 {
        journal.intend(Owner::Host, &tap("passing")).unwrap();
        journal.forget(Owner::Host, &tap("passing")).unwrap();
    }
    assert!(std::fs::metadata(&path).unwrap().len() <= COMPACT_BYTES_MIN + 1024);
    drop(journal);
    assert_eq!(Journal::open(&path).unwrap().resources(Owner::Host), [tap("kept")]);
}

#[derive(Debug, Clone)]
enum Step {
    Intend(u8, u8),
    Forget(u8, u8),
    Machine(u8, u8),
    ForgetOwner(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..4u8, 0..4u8).prop_map(|(o, r)| Step::Intend(o, r)),
        2 => (0..4u8, 0..4u8).prop_map(|(o, r)| Step::Forget(o, r)),
        1 => (1..4u8, 0..4u8).prop_map(|(o, r)| Step::Machine(o, r)),
        1 => (0..4u8).prop_map(Step::ForgetOwner),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Killed at any byte of any write, whoever opens it next sees the state after some step, and
    /// that is the last whole one.
    #[test]
    fn any_cut_is_a_prefix_of_the_history(
        steps in prop::collection::vec(step(), 1..24),
        cut in any::<prop::sample::Index>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let vms: Vec<Owner> =
            std::iter::once(Owner::Host).chain((1..4).map(|_| Owner::Machine(MachineId::new()))).collect();
        let journal = Journal::open(&path).unwrap();
        // The state after each step, with the file's length then.
        let mut history = vec![(0, Holdings::default())];
        for step in steps {
            match step {
                Step::Intend(o, r) => {
                    journal.intend(vms[usize::from(o)], &tap(&r.to_string())).unwrap();
                }
                Step::Forget(o, r) => {
                    journal.forget(vms[usize::from(o)], &tap(&r.to_string())).unwrap();
                }
                Step::Machine(o, r) => {
                    let Owner::Machine(id) = vms[usize::from(o)] else { unreachable!() };
                    journal.set_machine(id, serde_json::json!({ "n": r })).unwrap();
                }
                Step::ForgetOwner(o) => journal.forget_owner(vms[usize::from(o)]).unwrap(),
            }
            let state = journal.state();
            history.push((state.length, state.holdings.clone()));
        }
        drop(journal);
        let bytes = std::fs::read(&path).unwrap();
        let cut = cut.index(bytes.len() + 1);
        std::fs::write(&path, &bytes[..cut]).unwrap();
        let (_, expected) = history.iter().rfind(|(len, _)| *len <= cut as u64).unwrap();
        let reopened = Journal::open(&path).unwrap();
        prop_assert_eq!(&reopened.state().holdings, expected);
        prop_assert!(!dir.path().join("journal.damaged").exists());
        drop(reopened);
        // Compacting changes nothing.
        let again = Journal::open(&path).unwrap();
        prop_assert_eq!(&again.state().holdings, expected);
    }
}
