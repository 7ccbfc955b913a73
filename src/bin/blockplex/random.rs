//! Seeded random numbers: xoshiro256++ (Blackman, Vigna), started by
//! splitmix64. About one nanosecond a draw, no allocation, and the same
//! sequence on every machine, so that a seed repeats a run. Not for secrets.
//!
//! [`Random`] is the generator; [`mix`] is the bijective scrambler that seeds
//! it and that the stress pattern uses as its hash.

/// The odd constant nearest to 2^64 divided by the golden ratio: counters
/// multiplied by it are spread evenly before they are mixed.
pub const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Scrambles 64 bits. Bijective: two inputs never give the same output.
pub const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A seed nobody chose: from the clock and the process, for runs that then
/// print it.
pub fn seed_from_clock() -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        // A clock before 1970 still gives a seed, only a less varied one.
        .unwrap_or_default();
    mix(now.as_secs().wrapping_mul(GOLDEN) ^ u64::from(now.subsec_nanos()))
        ^ mix(u64::from(std::process::id()))
}

/// One stream of random numbers, for one thread.
#[derive(Clone, Debug)]
pub struct Random {
    state: [u64; 4],
}

impl Random {
    /// Stream number `stream` of `seed`. Streams of one seed do not resemble
    /// each other.
    pub fn new(seed: u64, stream: u64) -> Self {
        let base = mix(seed) ^ mix(stream.wrapping_add(1).wrapping_mul(GOLDEN));
        // `mix` is a bijection of four different inputs, so at most one word
        // is zero and the state is never the forbidden all-zero one.
        let word = |step: u64| mix(base.wrapping_add(GOLDEN.wrapping_mul(step)));
        Self { state: [word(1), word(2), word(3), word(4)] }
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        let [a, b, c, d] = self.state;
        let result = a.wrapping_add(d).rotate_left(23).wrapping_add(a);
        let (c, d) = (c ^ a, d ^ b);
        self.state = [a ^ d, b ^ c, c ^ (b << 17), d.rotate_left(45)];
        result
    }

    /// A number in `0..bound`, or 0 if `bound` is 0. The multiplication's bias
    /// is below `bound` / 2^64, which no image is large enough to show.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(bound)) >> 64) as u64
    }

    /// True `percent` times in a hundred.
    pub fn percent(&mut self, percent: u8) -> bool {
        self.below(100) < u64::from(percent)
    }

    /// A number in `0.0..1.0`.
    pub fn fraction(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_follows_its_published_recurrence() {
        // Computed by hand from the definition for the state 1, 2, 3, 4.
        let mut random = Random { state: [1, 2, 3, 4] };
        assert_eq!(random.bits(), 41_943_041);
        assert_eq!(random.bits(), 58_720_359);
        assert_eq!(random.bits(), 3_588_806_011_781_223);
    }

    #[test]
    fn a_seed_repeats_and_streams_differ() {
        let draw = |seed, stream| {
            let mut random = Random::new(seed, stream);
            [random.bits(), random.bits(), random.bits()]
        };
        assert_eq!(draw(7, 0), draw(7, 0));
        assert_ne!(draw(7, 0), draw(7, 1));
        assert_ne!(draw(7, 0), draw(8, 0));
    }

    #[test]
    fn draws_below_a_bound_reach_every_value_evenly() {
        let mut random = Random::new(1, 1);
        let mut seen = [0_u32; 10];
        for _ in 0..100_000 {
            seen[random.below(10) as usize] += 1;
        }
        assert!(seen.iter().all(|&count| (9_000..11_000).contains(&count)), "{seen:?}");
        assert_eq!(random.below(0), 0);
    }

    #[test]
    fn percentages_and_fractions_keep_their_ranges() {
        let mut random = Random::new(2, 0);
        assert!((0..1000).all(|_| !random.percent(0)));
        assert!((0..1000).all(|_| random.percent(100)));
        assert!((0..1000).all(|_| (0.0..1.0).contains(&random.fraction())));
    }
}
