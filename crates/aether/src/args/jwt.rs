//! Whose tokens are accepted beside keys.

use std::{path::PathBuf, time::Duration};

use aether_gateway::{JWT_LEEWAY_MAX, JWT_SECRET_BYTES_MIN, JwksTimes, JwtRules, JwtVerifier};

use super::values::parse_duration;
use crate::{exit::Exit, failure::Failure};

const LEEWAY: Duration = Duration::from_mins(1);
const LIFETIME: Duration = Duration::from_hours(24);
/// A secret is a line; this is a wrong file.
const SECRET_BYTES_MAX: u64 = 4096;

#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Tokens")]
#[expect(clippy::struct_field_names, reason = "they are the names of the options")]
pub(crate) struct JwtOptions {
    /// Accept JSON Web Tokens that are signed (HS256) with the secret in this file, of 32 bytes at
    /// least; or set AETHER_JWT_SECRET
    #[arg(long, env = "AETHER_JWT_SECRET_FILE", value_name = "FILE")]
    jwt_secret_file: Option<PathBuf>,
    #[arg(long, env = "AETHER_JWT_SECRET", hide = true, hide_env_values = true)]
    jwt_secret: Option<Secret>,
    /// Accept JSON Web Tokens that are signed (RS256, ES256, EdDSA) with a key of the set that is at
    /// this address, https:// or on this machine
    #[arg(long, env = "AETHER_JWT_JWKS_URL", value_name = "URL")]
    jwt_jwks_url: Option<String>,
    /// Whom tokens have to be for (`aud`); needed to accept any
    #[arg(long, env = "AETHER_JWT_AUDIENCE", value_name = "NAME")]
    jwt_audience: Option<String>,
    /// Who has to have made tokens (`iss`), to the letter
    #[arg(long, env = "AETHER_JWT_ISSUER", value_name = "NAME")]
    jwt_issuer: Option<String>,
    /// What clocks may differ by, 5m at most [default: 60s]
    #[arg(long, env = "AETHER_JWT_LEEWAY", value_name = "TIME", value_parser = leeway)]
    jwt_leeway: Option<Duration>,
    /// For how long a token may be good at most [default: 24h]
    #[arg(long, env = "AETHER_JWT_LIFETIME", value_name = "TIME", value_parser = parse_duration)]
    jwt_lifetime: Option<Duration>,
}

/// Printed by nobody.
#[derive(Clone)]
struct Secret(String);

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl JwtOptions {
    /// Reads the secret, so that what is wrong with it is found before anything is made. `None`:
    /// tokens open nothing.
    pub(crate) fn verifier(&self) -> Result<Option<JwtVerifier>, Failure> {
        let sources = [
            self.jwt_secret_file.is_some(),
            self.jwt_secret.is_some(),
            self.jwt_jwks_url.is_some(),
        ];
        match sources.into_iter().filter(|is_there| *is_there).count() {
            0 => self.nothing_else().map(|()| None),
            1 => self.with_keys().map(Some),
            _ => Err(misconfigured("more than one option says what tokens are checked with").hint(
                "leave all but one of --jwt-secret-file, AETHER_JWT_SECRET and --jwt-jwks-url out",
            )),
        }
    }

    /// What somebody thinks is in force, and is not, is told.
    fn nothing_else(&self) -> Result<(), Failure> {
        let left_alone = [
            ("--jwt-audience", self.jwt_audience.is_some()),
            ("--jwt-issuer", self.jwt_issuer.is_some()),
            ("--jwt-leeway", self.jwt_leeway.is_some()),
            ("--jwt-lifetime", self.jwt_lifetime.is_some()),
        ];
        match left_alone.into_iter().find(|(_, is_there)| *is_there) {
            None => Ok(()),
            Some((option, _)) => {
                let text = format!("{option} is there, and nothing to check tokens with");
                Err(misconfigured(text).hint("add --jwt-secret-file or --jwt-jwks-url"))
            }
        }
    }

    fn with_keys(&self) -> Result<JwtVerifier, Failure> {
        let said = |value: &Option<String>| value.clone().filter(|text| !text.trim().is_empty());
        let audience = said(&self.jwt_audience).ok_or_else(|| {
            misconfigured("--jwt-audience is missing: tokens for others would be accepted")
        })?;
        let issuer = said(&self.jwt_issuer);
        if issuer.is_none() && self.jwt_issuer.is_some() {
            return Err(misconfigured("--jwt-issuer is empty"));
        }
        let rules = JwtRules {
            audience,
            issuer,
            leeway: self.jwt_leeway.unwrap_or(LEEWAY),
            lifetime_max: self.jwt_lifetime.unwrap_or(LIFETIME),
        };
        if let Some(url) = &self.jwt_jwks_url {
            let made = JwtVerifier::with_jwks(url, JwksTimes::default(), rules);
            return made.map_err(|error| misconfigured(format!("--jwt-jwks-url: {error}")));
        }
        let secret = self.secret()?;
        JwtVerifier::with_secret(secret.as_bytes(), rules).ok_or_else(|| {
            misconfigured(format!(
                "the secret of tokens has less than {JWT_SECRET_BYTES_MIN} bytes"
            ))
            .hint("make one with: openssl rand -hex 32")
        })
    }

    fn secret(&self) -> Result<String, Failure> {
        let Some(path) = &self.jwt_secret_file else {
            return Ok(self.jwt_secret.clone().map(|secret| secret.0).unwrap_or_default());
        };
        let failed = |error| Failure::file("read", path, &error);
        let bytes = std::fs::metadata(path).map_err(failed)?.len();
        if bytes > SECRET_BYTES_MAX {
            let text = format!("{} has {bytes} bytes, and is no secret", path.display());
            return Err(misconfigured(text));
        }
        let text = std::fs::read_to_string(path).map_err(failed)?;
        Ok(text.trim_end_matches(['\r', '\n']).to_owned())
    }
}

fn leeway(text: &str) -> Result<Duration, String> {
    // Clocks that are exact are not a time of nothing, which no other option takes.
    let leeway = if matches!(text, "0" | "0s") { Duration::ZERO } else { parse_duration(text)? };
    let max = JWT_LEEWAY_MAX;
    if leeway > max { Err(format!("at most {} s", max.as_secs())) } else { Ok(leeway) }
}

fn misconfigured(text: impl Into<String>) -> Failure {
    Failure::new("jwt_misconfigured", Exit::Usage, text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(change: impl FnOnce(&mut JwtOptions)) -> Result<Option<JwtVerifier>, Failure> {
        let mut options = JwtOptions::default();
        change(&mut options);
        options.verifier()
    }

    #[test]
    fn wrong_combinations_are_refused_with_a_reason() {
        let long = || Some(Secret("s".repeat(32)));
        let audience = || Some("aetherium".to_owned());
        let url = || Some("https://id.example/jwks".to_owned());
        type Change = Box<dyn FnOnce(&mut JwtOptions)>;
        let wrong: Vec<(Change, &str)> = vec![
            (Box::new(move |o| o.jwt_audience = audience()), "nothing to check tokens with"),
            (Box::new(|o| o.jwt_leeway = Some(LEEWAY)), "--jwt-leeway is there"),
            (Box::new(move |o| o.jwt_secret = long()), "--jwt-audience is missing"),
            (
                Box::new(move |o| (o.jwt_secret, o.jwt_audience) = (long(), Some(" ".into()))),
                "--jwt-audience is missing",
            ),
            (
                Box::new(move |o| {
                    (o.jwt_secret, o.jwt_audience) = (Some(Secret("s".repeat(31))), audience());
                }),
                "less than 32 bytes",
            ),
            (
                Box::new(move |o| (o.jwt_secret, o.jwt_jwks_url) = (long(), url())),
                "more than one option",
            ),
            (
                Box::new(move |o| {
                    o.jwt_audience = audience();
                    o.jwt_jwks_url = Some("http://id.example/jwks".into());
                }),
                "https://",
            ),
            (
                Box::new(move |o| {
                    o.jwt_audience = audience();
                    (o.jwt_secret, o.jwt_issuer) = (long(), Some(String::new()));
                }),
                "--jwt-issuer is empty",
            ),
        ];
        for (change, reason) in wrong {
            let failure = of(change).unwrap_err();
            assert!(failure.message.contains(reason), "{failure}");
            assert_eq!((failure.code.as_str(), failure.exit.status()), ("jwt_misconfigured", 2));
            assert!(!format!("{failure:?}").contains("sss"));
        }
        assert!(of(|_| ()).unwrap().is_none());
        let good = of(move |o| (o.jwt_jwks_url, o.jwt_audience) = (url(), audience()));
        assert!(good.unwrap().is_some());
    }

    #[test]
    fn a_secret_is_read_from_its_file_and_never_printed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        let options = JwtOptions {
            jwt_secret_file: Some(path.clone()),
            jwt_audience: Some("aetherium".into()),
            ..JwtOptions::default()
        };
        assert_eq!(options.verifier().unwrap_err().exit.status(), 3);
        // The end of the line is none of it.
        std::fs::write(&path, format!("{}\n", "s".repeat(31))).unwrap();
        assert!(options.verifier().is_err());
        std::fs::write(&path, format!("{}\r\n", "s".repeat(32))).unwrap();
        assert!(options.verifier().unwrap().is_some());
        std::fs::write(&path, "s".repeat(5000)).unwrap();
        assert!(options.verifier().unwrap_err().message.contains("is no secret"));
        let told =
            format!("{:?}", JwtOptions { jwt_secret: Some(Secret("hunter2".into())), ..options });
        assert!(!told.contains("hunter2"), "{told}");
    }

    #[test]
    fn leeways_have_a_bound() {
        assert_eq!(leeway("0"), Ok(Duration::ZERO));
        assert_eq!(leeway("5m"), Ok(JWT_LEEWAY_MAX));
        assert!(leeway("301s").is_err() && leeway("-1").is_err());
    }
}
