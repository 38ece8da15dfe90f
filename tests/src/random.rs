//! Moments and sizes that differ from run to run and can be had again.

/// A small generator, so that a failure can be replayed by its seed.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    #[must_use]
    pub fn from_environment() -> Self {
        let seed = crate::platform::env_path("AETHER_SEED")
            .and_then(|seed| seed.to_str()?.parse().ok())
            .unwrap_or_else(|| u64::from(std::process::id()));
        #[expect(clippy::print_stdout, reason = "what replays a failure")]
        {
            println!("AETHER_SEED={seed}");
        }
        Self::with_seed(seed)
    }

    #[must_use]
    pub fn with_seed(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
