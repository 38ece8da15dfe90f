use std::{collections::BTreeSet, fmt::Write as _, path::PathBuf};

use clap::{CommandFactory as _, FromArgMatches as _};

use super::{
    ConfigFile, OPTION,
    keys::{KEYS, Kind},
    show,
};
use crate::{
    args::{Args, Command, LogPlan, Up},
    failure::Failure,
};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn read(&self, text: &str) -> Result<ConfigFile, Failure> {
        ConfigFile::read(&self.write("aetherium.yaml", text))
    }
}

fn up(file: &ConfigFile, line: &[&str]) -> Up {
    let line = [&["aether", "up"], line].concat();
    let matches = file.over(Args::command()).try_get_matches_from(line).unwrap();
    match Args::from_arg_matches(&matches).unwrap().command {
        Command::Up(up) => up,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_command_line_is_before_the_file_and_that_before_what_is_built_in() {
    let folder = Folder::new();
    let file = folder
        .read(
            "listen: 127.0.0.1:9000\nkeep_vms: true\nvms: {max: 5}\n\
             pools: [default=2, \"web:v1=1..3\"]\nsnapshots.max_age: 2d\n\
             logging:\n  loki: {url: \"http://loki:3100\", batch_size: 7}\n",
        )
        .unwrap();
    let plain = up(&file, &[]);
    assert_eq!(plain.listen.port(), 9000);
    assert!(plain.keep_vms && !plain.migrate);
    assert_eq!((plain.capacity.max_vms, plain.capacity.max_starting), (5, 128));
    assert_eq!(plain.capacity.pool.len(), 2);
    assert_eq!(plain.snapshots.snapshot_max_age.unwrap().as_secs(), 2 * 86_400);
    let Ok(LogPlan::Loki(loki)) = plain.logging.plan() else { panic!("not Loki") };
    assert_eq!(loki.batch_entries, 7);
    let said = up(&file, &["--max-vms", "9", "--pool", "none"]);
    assert_eq!((said.capacity.max_vms, said.capacity.pool.len()), (9, 1));
}

#[test]
fn what_is_wrong_is_named_with_its_place_and_what_to_do() {
    let folder = Folder::new();
    for (text, message, hint) in [
        ("logging: {loki: {urll: x}}", "no key logging.loki.urll", "logging.loki.url?"),
        ("max_vms: 3", "no key max_vms", ""),
        ("vms: {maximum: 3}", "no key vms.maximum", "vms.max?"),
        ("comet: 1", "no key comet", "docs/configuration.md"),
        ("postgres: {password: hunter2}", "no key postgres.password", "postgres.password_file"),
        ("redis: {url: \"redis://u:hunter2@h\"}", "redis.url has a password", "redis.url_file"),
        ("vms: 3", "vms is a section", ""),
        ("vms: {max: {a: 1}}", "vms.max takes one value", ""),
        ("vms: {max: [1, 2]}", "vms.max takes one value", ""),
        ("vms: {max: }", "vms.max takes one value", ""),
        ("vms: {max: many}", "vms.max: \"many\" does not fit", ""),
        ("vms: {driver: xen}", "one of auto, qemu, firecracker, docker, sim", ""),
        ("keep_vms: 3", "keep_vms is true or false", ""),
        ("logging: {loki: {batch_size: 9999}}", "logging.loki.batch_size: 9999 is not in", ""),
        ("pools: [\"web=3..2\"]", "pools: ", ""),
        ("listen: [", "aetherium.yaml", ""),
        ("- a", "aetherium.yaml", ""),
    ] {
        let failure = folder.read(text).unwrap_err();
        let told = failure.to_string();
        assert!(told.contains(message), "{text}: {told}");
        assert!(failure.hint.clone().unwrap_or_default().contains(hint), "{text}: {told}");
        assert!(told.contains("aetherium.yaml"), "{text}: {told}");
        assert!(!told.contains("hunter2"), "{text}: {told}");
        assert_eq!(failure.exit.status(), 2, "{text}");
    }
    let missing = ConfigFile::read(&folder.0.path().join("none.yaml")).unwrap_err();
    assert_eq!(missing.exit.status(), 3);
}

#[test]
fn secrets_come_from_files_and_are_never_shown() {
    let folder = Folder::new();
    let password = folder.write("password", "hunter2\n");
    let file = folder
        .read(&format!(
            "postgres: {{host: localhost, password_file: {0:?}}}\nredis: {{url_file: {1:?}}}\n",
            password,
            folder.write("redis", "redis://:hunter2@localhost\n"),
        ))
        .unwrap();
    let up = up(&file, &[]);
    assert!(up.database.config().unwrap().is_some() && up.redis.config().unwrap().is_some());
    let settings = show::settings(&file, &show::matches(&file).unwrap());
    let of = |key: &str| settings.iter().find(|s| s.key == key).unwrap();
    assert_eq!(of("postgres.password_file").value.as_deref(), Some("(set)"));
    assert_eq!((of("redis.url_file").source, of("postgres.host").source), ("file", "file"));
    assert_eq!(of("postgres.port").value, None);
    assert_eq!((of("vms.max").value.as_deref(), of("vms.max").source), (Some("1000"), "default"));
    let told = format!("{settings:?} {file:?}");
    assert!(!told.contains("hunter2"), "{told}");

    let both = format!("redis: {{url: \"redis://h\", url_file: {password:?}}}");
    assert!(folder.read(&both).unwrap_err().message.contains("say the same"));
    let empty = folder.write("empty", "\n");
    let failure = folder.read(&format!("redis: {{url_file: {empty:?}}}")).unwrap_err();
    assert!(failure.message.contains("is empty"), "{failure}");
}

/// Every option can be said in the file, and every key is one.
#[test]
fn keys_and_options_are_the_same() {
    let mut root = Args::command();
    root.build();
    let up = root.find_subcommand("up").unwrap();
    let not_in_a_file = [OPTION, "help", "version", "json", "output", "url", "key", "ca", "cache"];
    let options: BTreeSet<_> = up
        .get_arguments()
        .filter(|option| !option.is_hide_set() || option.get_id() == "postgres_password")
        .map(|option| option.get_id().as_str())
        .filter(|id| !not_in_a_file.contains(id) && *id != "redis_password")
        .collect();
    let mut keys: BTreeSet<_> = KEYS.iter().map(|key| key.option).collect();
    assert!(keys.remove("redis_password"));
    assert_eq!(keys, options);
    let paths: BTreeSet<_> = KEYS.iter().map(|key| key.path).collect();
    assert_eq!(paths.len(), KEYS.len());
}

#[test]
fn every_configuration_file_here_is_one() {
    let folder = std::path::Path::new(REPOSITORY).join("deploy");
    let file = ConfigFile::read(&folder.join("aetherium.yaml")).unwrap();
    assert!(file.values.len() > 5);
    up(&file, &[]);
}

#[test]
fn the_page_has_every_key() {
    let mut table =
        String::from("| key | option | environment | default | |\n|---|---|---|---|---|\n");
    let mut root = Args::command();
    root.build();
    let up = root.find_subcommand("up").unwrap();
    for key in KEYS {
        let option = up.get_arguments().find(|arg| arg.get_id() == key.option).unwrap();
        let help = option.get_help().map(|help| help.to_string().replace('|', "\\|"));
        let (help, said) = match help.as_deref().and_then(|help| help.split_once(" [default: ")) {
            Some((help, said)) => (help.to_owned(), said.trim_end_matches(']').to_owned()),
            None => match help.as_deref().and_then(|help| help.strip_prefix("[default: ")) {
                Some(said) => (String::new(), said.trim_end_matches(']').to_owned()),
                None => (help.unwrap_or_default(), String::new()),
            },
        };
        let default = option.get_default_values();
        let default: Vec<_> = default.iter().map(|value| value.to_string_lossy()).collect();
        let default = if default.is_empty() { said } else { default.join(", ") };
        let help = match key.kind {
            Kind::SecretFile => "A file with the secret, in one line".to_owned(),
            Kind::Plain | Kind::Url => help,
        };
        let long = option.get_long().filter(|_| !option.is_hide_set());
        let flag = long.map(|long| format!("`--{long}`")).unwrap_or_default();
        let env = option.get_env().map(|name| format!("`{}`", name.to_string_lossy()));
        let (path, env) = (key.path, env.unwrap_or_default());
        writeln!(table, "| `{path}` | {flag} | {env} | {default} | {help} |").unwrap();
    }
    let page = format!("{REPOSITORY}/docs/configuration.md");
    let text = std::fs::read_to_string(&page).unwrap();
    if !text.contains(&table) {
        std::fs::write(format!("{page}.new"), &table).unwrap();
        panic!("docs/configuration.md lacks the table in docs/configuration.md.new: put it there");
    }
}
