//! JSON Web Tokens: who one is, as somebody else says it who is trusted to.
//!
//! What is accepted is said by the configuration alone. A token chooses a key by its `kid`, and a key
//! is good for one algorithm, so that nobody chooses how their token is checked. A token that passes is
//! turned into the same rights that a key has; what it does not say, it may not.
//!
//! Nothing of a token is kept, logged or shown but the name of its subject.

mod crypto;
mod jwks;
mod subject;

use std::{fmt, sync::Arc, time::Duration};

use aether_store::{Store, StoreError};
use aether_types::{Access, ProjectId, Role, Scope, Timestamp, limits};
use jsonwebtoken::{Algorithm, DecodingKey, Header, Validation, decode_header, errors::ErrorKind};
use serde::Deserialize;

pub use jwks::{JwksTimes, JwksUrlError};
pub(super) use subject::Subject;

use jwks::Jwks;

/// Of a whole token; what is in one that is longer is of no concern here.
const TOKEN_BYTES_MAX: usize = 8 << 10;

/// Of a shared secret: as many as what it is hashed to.
pub const JWT_SECRET_BYTES_MIN: usize = 32;

/// Clocks that differ by more are wrong.
pub const JWT_LEEWAY_MAX: Duration = Duration::from_mins(5);

/// What tokens are checked against.
#[derive(Debug, Clone)]
pub struct JwtRules {
    /// One of a token's has to be this.
    pub audience: String,
    /// `None`: any.
    pub issuer: Option<String>,
    /// What clocks may differ by.
    pub leeway: Duration,
    /// From the time that a token was made, or from now, to its end.
    pub lifetime_max: Duration,
}

/// Checks tokens. Cheap to clone.
#[derive(Clone)]
pub struct JwtVerifier(Arc<Verifier>);

struct Verifier {
    rules: JwtRules,
    keys: Keys,
}

enum Keys {
    /// HS256.
    Secret(DecodingKey),
    /// RS256, ES256 or EdDSA, as each key has it.
    Jwks(Arc<Jwks>),
}

impl fmt::Debug for JwtVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtVerifier").field("rules", &self.0.rules).finish_non_exhaustive()
    }
}

/// Who asks, by a token.
#[derive(Debug)]
pub(super) struct Proven {
    pub(super) subject: Subject,
    pub(super) access: Access,
}

/// Why a token opens nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// One answer for all that is wrong before it is known that the token is somebody's.
    #[error("the token is not accepted here")]
    Unproven(&'static str),
    /// Whoever has a token that was signed for us may know what is wrong with it.
    #[error("the token is not accepted here: {0}")]
    Claims(&'static str),
    #[error("the keys of tokens cannot be had now")]
    NoKeys,
    #[error("look the token's project up")]
    Store(#[from] StoreError),
}

/// What we read of a token. Times may have fractions.
#[derive(Deserialize)]
struct Claims {
    exp: f64,
    iat: Option<f64>,
    iss: Option<String>,
    sub: Option<String>,
    role: Option<String>,
    scope: Option<String>,
    project: Option<String>,
}

impl JwtVerifier {
    /// HS256 with this secret, of [`JWT_SECRET_BYTES_MIN`] at least; `None`: it is shorter.
    #[must_use]
    pub fn with_secret(secret: &[u8], rules: JwtRules) -> Option<Self> {
        let is_long_enough = secret.len() >= JWT_SECRET_BYTES_MIN;
        let keys = is_long_enough.then(|| Keys::Secret(DecodingKey::from_secret(secret)))?;
        Some(Self::new(keys, rules))
    }

    /// RS256, ES256 and EdDSA with the keys that are there. Nothing is asked before a token comes.
    pub fn with_jwks(url: &str, times: JwksTimes, rules: JwtRules) -> Result<Self, JwksUrlError> {
        Ok(Self::new(Keys::Jwks(Arc::new(Jwks::new(url, times)?)), rules))
    }

    fn new(keys: Keys, mut rules: JwtRules) -> Self {
        crypto::install();
        rules.leeway = rules.leeway.min(JWT_LEEWAY_MAX);
        Self(Arc::new(Verifier { rules, keys }))
    }

    /// Whether it has the shape of a token: no key has a dot in it.
    pub(super) fn takes(text: &str) -> bool {
        let digit = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        let mut parts = 0;
        text.split('.').all(|part| {
            parts += 1;
            !part.is_empty() && part.bytes().all(digit)
        }) && parts == 3
    }

    pub(super) async fn verify(
        &self,
        store: &dyn Store,
        text: &str,
        now: Timestamp,
    ) -> Result<Proven, Refusal> {
        if text.len() > TOKEN_BYTES_MAX {
            return Err(Refusal::Unproven("it is too long"));
        }
        let header = decode_header(text).map_err(|_| Refusal::Unproven("its header"))?;
        if header.crit.is_some() {
            // It says that who does not know some word has to refuse it, and we know none.
            return Err(Refusal::Unproven("it is critical"));
        }
        let (algorithm, key) = self.key(&header).await?;
        let claims = self.0.rules.decode(text, &key, algorithm)?;
        self.0.rules.check_times(&claims, now)?;
        let subject = Subject::new(claims.iss.as_deref(), claims.sub.as_deref());
        let subject = subject.ok_or(Refusal::Claims("`sub` is missing, or it is too long"))?;
        let access = access(store, &claims).await?;
        Ok(Proven { subject, access })
    }

    async fn key(&self, header: &Header) -> Result<(Algorithm, DecodingKey), Refusal> {
        let (algorithm, key) = match &self.0.keys {
            Keys::Secret(key) => (Algorithm::HS256, key.clone()),
            Keys::Jwks(jwks) => {
                let kid = header.kid.as_deref().ok_or(Refusal::Unproven("it names no key"))?;
                let found = jwks.key(kid).await.map_err(|_| Refusal::NoKeys)?;
                found.ok_or(Refusal::Unproven("its key is not known"))?
            }
        };
        if header.alg != algorithm {
            return Err(Refusal::Unproven("its algorithm is not the key's"));
        }
        Ok((algorithm, key))
    }
}

impl JwtRules {
    fn decode(
        &self,
        text: &str,
        key: &DecodingKey,
        algorithm: Algorithm,
    ) -> Result<Claims, Refusal> {
        let mut wanted = Validation::new(algorithm);
        wanted.leeway = self.leeway.as_secs();
        wanted.validate_nbf = true;
        wanted.set_audience(&[&self.audience]);
        wanted.set_required_spec_claims(&["exp", "aud"]);
        if let Some(issuer) = &self.issuer {
            wanted.set_issuer(&[issuer]);
            wanted.set_required_spec_claims(&["exp", "aud", "iss"]);
        }
        let decoded = jsonwebtoken::decode::<Claims>(text, key, &wanted);
        // The signature is looked at before any claim.
        decoded.map(|token| token.claims).map_err(|error| match error.kind() {
            ErrorKind::ExpiredSignature => Refusal::Claims("it is past its time"),
            ErrorKind::ImmatureSignature => Refusal::Claims("its time has not come (`nbf`)"),
            ErrorKind::InvalidAudience => Refusal::Claims("it is for somebody else (`aud`)"),
            ErrorKind::InvalidIssuer => Refusal::Claims("it is of somebody else (`iss`)"),
            ErrorKind::MissingRequiredClaim(_)
            | ErrorKind::InvalidClaimFormat(_)
            | ErrorKind::Json(_) => Refusal::Claims("a claim is missing, or not of its form"),
            _ => Refusal::Unproven("its signature"),
        })
    }

    /// What the decoding has not looked at: a token that is from later than now, and one for ever.
    fn check_times(&self, claims: &Claims, now: Timestamp) -> Result<(), Refusal> {
        #[expect(clippy::cast_precision_loss, reason = "exact for some 280 000 years")]
        let now = now.unix_ms() as f64 / 1000.0;
        let leeway = self.leeway.as_secs_f64();
        let made = claims.iat.unwrap_or(now);
        if made > now + leeway {
            return Err(Refusal::Claims("it is from later than now (`iat`)"));
        }
        // An early `iat` shortens it; none that lies makes it longer, as now counts too.
        let longest = self.lifetime_max.as_secs_f64();
        if claims.exp - made > longest || claims.exp - now > longest + leeway {
            return Err(Refusal::Claims("it is good for too long (`exp`)"));
        }
        Ok(())
    }
}

async fn access(store: &dyn Store, claims: &Claims) -> Result<Access, Refusal> {
    let role = claims.role.as_deref().ok_or(Refusal::Claims("it has no `role`"))?;
    let role = role.parse().map_err(|_| Refusal::Claims("its `role` is none"))?;
    let scopes = scopes(claims.scope.as_deref())?;
    let project = match claims.project.as_deref() {
        // Admins of the default project are the platform's: that is said or it is not so.
        None if role == Role::Admin => {
            return Err(Refusal::Claims("an admin's names its `project`"));
        }
        None => ProjectId::DEFAULT,
        Some(named) => {
            let found = match named.parse::<ProjectId>() {
                Ok(id) => store.project(id).await?,
                Err(_) => store.project_by_name(named).await?,
            };
            found.ok_or(Refusal::Claims("its `project` is none"))?.id
        }
    };
    Ok(Access { project, role, scopes })
}

/// No claim: all that the role may. A claim with nothing in it may nothing, and is refused, since it
/// would mean all.
fn scopes(claim: Option<&str>) -> Result<Vec<Scope>, Refusal> {
    let Some(claim) = claim else { return Ok(Vec::new()) };
    let scopes: Result<Vec<Scope>, _> = claim.split_ascii_whitespace().map(str::parse).collect();
    let mut scopes = scopes.map_err(|_| Refusal::Claims("a word of its `scope` is none"))?;
    scopes.sort_unstable();
    scopes.dedup();
    if scopes.is_empty() || scopes.len() > limits::KEY_SCOPES_MAX {
        return Err(Refusal::Claims("its `scope` has no word, or too many"));
    }
    Ok(scopes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_told_from_keys_by_their_shape() {
        for token in ["a.b.c", "eyJ-_0.e30.AAAA"] {
            assert!(JwtVerifier::takes(token), "{token}");
        }
        for other in
            ["", "a", "a.b", "a.b.", ".b.c", "a..c", "a.b.c.d", "a.b.c=", "a.b c.d", "a.é.c"]
        {
            assert!(!JwtVerifier::takes(other), "{other}");
        }
        assert!(!JwtVerifier::takes(&format!("aeth_{}", "0".repeat(72))));
    }

    #[test]
    fn secrets_are_long_and_never_printed() {
        let rules = JwtRules {
            audience: "aetherium".into(),
            issuer: None,
            leeway: Duration::from_hours(1),
            lifetime_max: Duration::from_hours(1),
        };
        assert!(JwtVerifier::with_secret(&[b's'; 31], rules.clone()).is_none());
        let verifier = JwtVerifier::with_secret(&[b's'; 32], rules).unwrap();
        assert_eq!(verifier.0.rules.leeway, JWT_LEEWAY_MAX);
        let told = format!("{verifier:?}");
        assert!(told.contains("aetherium") && !told.contains("sss") && !told.contains("115"));
    }

    #[test]
    fn a_scope_that_says_nothing_is_not_all() {
        assert_eq!(scopes(None).unwrap(), []);
        assert_eq!(scopes(Some("vms:read  vms:read tasks:read")).unwrap().len(), 2);
        for bad in ["", " ", "openid", "vms:read openid", "vms"] {
            assert!(scopes(Some(bad)).is_err(), "{bad}");
        }
    }
}
