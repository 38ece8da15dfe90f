//! The keys of the configuration file: each is the default of one option of `aether up`.

/// One key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    /// With a dot for each section.
    pub(super) path: &'static str,
    /// Of the option, as clap knows it.
    pub(super) option: &'static str,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Plain,
    /// May have a password in it, which must not stand in the file.
    Url,
    /// Names a file, whose content is the option's value.
    SecretFile,
}

const fn plain(path: &'static str, option: &'static str) -> Key {
    Key { path, option, kind: Kind::Plain }
}

const fn url(path: &'static str, option: &'static str) -> Key {
    Key { path, option, kind: Kind::Url }
}

const fn secret(path: &'static str, option: &'static str) -> Key {
    Key { path, option, kind: Kind::SecretFile }
}

pub(super) const KEYS: &[Key] = &[
    plain("listen", "listen"),
    plain("keep_vms", "keep_vms"),
    plain("data_dir", "data_dir"),
    url("postgres.url", "database_url"),
    secret("postgres.url_file", "database_url"),
    plain("postgres.host", "postgres_host"),
    plain("postgres.port", "postgres_port"),
    plain("postgres.user", "postgres_user"),
    secret("postgres.password_file", "postgres_password"),
    plain("postgres.db", "postgres_db"),
    plain("postgres.sslmode", "postgres_sslmode"),
    plain("postgres.ca_file", "postgres_ca_file"),
    plain("postgres.connections_max", "postgres_connections_max"),
    plain("postgres.connections_min", "postgres_connections_min"),
    plain("postgres.acquire_timeout", "postgres_acquire_timeout"),
    plain("postgres.idle_timeout", "postgres_idle_timeout"),
    plain("postgres.lifetime_max", "postgres_lifetime_max"),
    plain("postgres.statement_timeout", "postgres_statement_timeout"),
    plain("postgres.migrate", "migrate"),
    url("redis.url", "redis_url"),
    secret("redis.url_file", "redis_url"),
    plain("redis.addr", "redis_addr"),
    plain("redis.user", "redis_user"),
    secret("redis.password_file", "redis_password"),
    plain("redis.ca_file", "redis_ca_file"),
    plain("redis.prefix", "redis_prefix"),
    plain("vms.driver", "driver"),
    plain("vms.image", "image"),
    plain("vms.image_dir", "image_dir"),
    plain("vms.network_range", "network_range"),
    plain("vms.firecracker", "firecracker"),
    plain("vms.jailer", "jailer"),
    plain("vms.docker_socket", "docker_socket"),
    plain("vms.max", "max_vms"),
    plain("vms.max_starting", "max_starting"),
    plain("pools", "pool"),
    plain("templates.dir", "template_dir"),
    plain("templates.no_default", "no_default_template"),
    plain("snapshots.keep", "snapshot_keep"),
    plain("snapshots.max_age", "snapshot_max_age"),
    plain("snapshots.disk_mb", "snapshot_disk_mb"),
    plain("tools.default", "default_tools"),
    plain("tools.no_default", "no_default_tools"),
    plain("tools.dir", "tools_dir"),
    plain("tools.catalogue", "tools_catalogue"),
    plain("tools.mirror", "tools_mirror"),
    plain("tools.budget_mb", "tools_budget_mb"),
    plain("tools.npm_registry", "npm_registry"),
    plain("tools.pypi_index", "pypi_index"),
    plain("tools.debian_mirror", "debian_mirror"),
    plain("tools.debian_security_mirror", "debian_security_mirror"),
    plain("worker.host", "worker_host"),
    plain("worker.zone", "worker_zone"),
    plain("worker.labels", "worker_labels"),
    plain("worker.vcpus", "worker_vcpus"),
    plain("worker.memory_mb", "worker_memory"),
    plain("worker.vms", "worker_vms"),
    plain("worker.heartbeat", "worker_heartbeat"),
    plain("worker.lease", "worker_lease"),
    plain("worker.stream_listen", "stream_listen"),
    plain("worker.stream_advertise", "stream_advertise"),
    plain("worker.stream_certificate_lifetime", "stream_certificate_lifetime"),
    plain("gateway.tls.cert", "tls_cert"),
    plain("gateway.tls.key", "tls_key"),
    plain("gateway.tls.auto", "tls_auto"),
    plain("gateway.tls.names", "tls_name"),
    plain("gateway.insecure_http", "insecure_http"),
    plain("authority.dir", "authority_dir"),
    plain("limits.key_rate", "key_rate"),
    plain("limits.address_rate", "address_rate"),
    plain("cors.origins", "cors_origin"),
    plain("jwt.secret_file", "jwt_secret_file"),
    plain("jwt.jwks_url", "jwt_jwks_url"),
    plain("jwt.audience", "jwt_audience"),
    plain("jwt.issuer", "jwt_issuer"),
    plain("jwt.leeway", "jwt_leeway"),
    plain("jwt.lifetime", "jwt_lifetime"),
    plain("logging.provider", "provider"),
    url("logging.loki.url", "loki_url"),
    secret("logging.loki.url_file", "loki_url"),
    plain("logging.loki.batch_size", "loki_batch_size"),
    plain("logging.loki.batch_interval", "loki_batch_interval"),
    plain("logging.keep_mb", "log_keep_mb"),
    plain("logging.keep_age", "log_keep_age"),
    plain("logging.format", "log_format"),
    plain("logging.level", "log_level"),
];

/// What people write and must not, and what to write instead.
const REFUSED: &[(&str, &str)] = &[
    (
        "postgres.password",
        "put it into a file and name that with postgres.password_file, or set POSTGRES_PASSWORD",
    ),
    (
        "redis.password",
        "put it into a file and name that with redis.password_file, or set REDIS_PASSWORD",
    ),
    (
        "jwt.secret",
        "put it into a file and name that with jwt.secret_file, or set AETHER_JWT_SECRET",
    ),
    ("key", "API keys are made by the platform; clients take AETHER_KEY"),
];

pub(super) fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// Whether keys are below this one.
pub(super) fn is_section(path: &str) -> bool {
    KEYS.iter().any(|key| key.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
}

/// What to do about a key that there is not.
pub(super) fn advice(path: &str) -> String {
    if let Some((_, advice)) = REFUSED.iter().find(|(refused, _)| *refused == path) {
        return (*advice).to_owned();
    }
    // A section may be wrong or forgotten, and the last word right.
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    let likeness = |known: &str| {
        let words = strsim::jaro_winkler(&last(path), &last(known)) * 0.9;
        strsim::jaro_winkler(path, known).max(words)
    };
    let sections = KEYS.iter().filter_map(|key| key.path.rsplit_once('.').map(|(above, _)| above));
    let known = sections.chain(KEYS.iter().map(|key| key.path));
    match known.max_by(|a, b| likeness(a).total_cmp(&likeness(b))) {
        Some(known) if likeness(known) > 0.75 => format!("did you mean {known}?"),
        _ => "docs/configuration.md has all keys".to_owned(),
    }
}
