//! The addresses of one model: each request goes to the one with the fewest in flight, and one that failed
//! rests.
//!
//! A rest grows with the failures in a row and is drawn between nothing and its bound (full jitter), so that
//! requests that failed together don't come back together. After it one request tries the address for the
//! others. Where all rest, requests wait for the first: that is the back-off of a single address.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use reqwest::Url;

/// Bound of the rest after the first failure; it doubles with each.
const FIRST_REST: Duration = Duration::from_millis(500);
const LONGEST_REST: Duration = Duration::from_secs(30);
/// The least rest after the first 429 that names none; it doubles with each. Limits are on requests a minute, and
/// five requests, of which four are retries, reach over half of one.
const FIRST_BUSY_REST: Duration = Duration::from_secs(2);

/// How long an address rests at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// As the back-off draws.
    Any,
    /// The server asked for that.
    Asked(Duration),
    /// It has too many requests, and did not say for how long.
    Busy,
}

/// The addresses, shared by all requests.
pub struct Addresses {
    all: Mutex<Vec<Address>>,
}

struct Address {
    url: Url,
    in_flight: usize,
    /// In a row.
    failures: u32,
    failed_at: Option<Instant>,
    /// At most until then; of the past where it is not at rest.
    rests_until: Instant,
}

/// An address while a request is on its way.
pub struct Taken<'a> {
    of: &'a Addresses,
    index: usize,
    url: Url,
    since: Instant,
}

enum Choice {
    Take(usize, Url),
    Wait(Instant),
}

impl Addresses {
    /// Of the service that answers chats, below each of `bases`.
    pub fn new(bases: &[Url]) -> Self {
        let now = Instant::now();
        let address = |base: &Url| {
            let mut url = base.clone();
            url.set_path(&format!("{}/chat/completions", base.path().trim_end_matches('/')));
            Address { url, in_flight: 0, failures: 0, failed_at: None, rests_until: now }
        };
        Self { all: Mutex::new(bases.iter().map(address).collect()) }
    }

    /// The address for the next request; waits while all rest.
    pub async fn take(&self) -> Taken<'_> {
        loop {
            let now = Instant::now();
            match self.choose(now) {
                Choice::Take(index, url) => return Taken { of: self, index, url, since: now },
                Choice::Wait(until) => tokio::time::sleep_until(until.into()).await,
            }
        }
    }

    fn choose(&self, now: Instant) -> Choice {
        let mut all = self.all();
        let rested = |a: &Address| a.rests_until <= now;
        // One request tries an address that failed; more follow it where there is no other.
        let good = |a: &Address| a.failures == 0 || (rested(a) && a.in_flight == 0);
        let of_least = |which: &dyn Fn(&Address) -> bool| {
            let fit = all.iter().enumerate().filter(|(_, a)| which(a));
            fit.min_by_key(|(_, a)| a.in_flight).map(|(index, _)| index)
        };
        let found = of_least(&good).or_else(|| of_least(&rested));
        match found.and_then(|index| Some((index, all.get_mut(index)?))) {
            Some((index, address)) => {
                address.in_flight += 1;
                Choice::Take(index, address.url.clone())
            }
            None => Choice::Wait(all.iter().map(|a| a.rests_until).min().unwrap_or(now)),
        }
    }

    fn all(&self) -> MutexGuard<'_, Vec<Address>> {
        self.all.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn with(&self, index: usize, change: impl FnOnce(&mut Address)) {
        if let Some(address) = self.all().get_mut(index) {
            change(address);
        }
    }
}

impl Address {
    /// A request that was sent at `since` failed.
    fn fail(&mut self, since: Instant, now: Instant, rest: Rest) {
        // Requests that were in flight together fail of one cause.
        if self.failed_at.is_none_or(|at| since >= at) {
            self.failures = self.failures.saturating_add(1);
            self.failed_at = Some(now);
            self.rests_until = now + bound(self.failures).mul_f64(random());
        }
        let least = match rest {
            Rest::Any => Duration::ZERO,
            Rest::Asked(wait) => wait,
            Rest::Busy => doubled(FIRST_BUSY_REST, self.failures).mul_f64(1.0 + random() / 4.0),
        };
        self.rests_until = self.rests_until.max(now + least);
    }
}

fn bound(failures: u32) -> Duration {
    doubled(FIRST_REST, failures)
}

fn doubled(first: Duration, failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    first.saturating_mul(1 << doublings).min(LONGEST_REST)
}

/// Between 0 and 1; every hasher of the standard library has keys of its own.
fn random() -> f64 {
    RandomState::new().hash_one(0_u8) as f64 / u64::MAX as f64
}

impl Taken<'_> {
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The server was there, whatever it said.
    pub fn succeeded(self) {
        self.of.with(self.index, |address| address.failures = 0);
    }

    pub fn failed(self, rest: Rest) {
        self.of.with(self.index, |address| address.fail(self.since, Instant::now(), rest));
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.of.with(self.index, |address| address.in_flight = address.in_flight.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn two() -> Addresses {
        Addresses::new(&["http://a/v1", "http://b/"].map(|url| Url::parse(url).unwrap()))
    }

    fn chosen(addresses: &Addresses, now: Instant) -> Option<usize> {
        match addresses.choose(now) {
            Choice::Take(index, _) => Some(index),
            Choice::Wait(until) => {
                assert!(until > now);
                None
            }
        }
    }

    #[tokio::test]
    async fn requests_go_where_the_fewest_are() {
        let addresses = two();
        let first = addresses.take().await;
        let second = addresses.take().await;
        assert_eq!(first.url().as_str(), "http://a/v1/chat/completions");
        assert_eq!(second.url().as_str(), "http://b/chat/completions");
        drop(second);
        assert_eq!(addresses.take().await.index, 1);
    }

    #[test]
    fn one_that_failed_rests_and_is_tried_by_one() {
        let (addresses, now) = (two(), Instant::now());
        addresses.with(0, |a| a.fail(now, now, Rest::Asked(10 * SECOND)));
        assert_eq!([0; 3].map(|_| chosen(&addresses, now)), [Some(1); 3]);
        let later = now + 11 * SECOND;
        assert_eq!([0; 3].map(|_| chosen(&addresses, later)), [Some(0), Some(1), Some(1)]);
        addresses.with(1, |a| a.fail(now, later, Rest::Asked(10 * SECOND)));
        assert_eq!(chosen(&addresses, later), Some(0), "there is no other");
        addresses.with(0, |a| a.fail(later, later, Rest::Asked(10 * SECOND)));
        assert_eq!(chosen(&addresses, later), None);
    }

    #[test]
    fn retries_of_a_busy_address_last_until_its_limit_may_be_over() {
        let (addresses, mut now) = (two(), Instant::now());
        let began = now;
        for _ in 0..4 {
            addresses.with(0, |a| a.fail(now, now, Rest::Busy));
            now = addresses.all()[0].rests_until;
        }
        let waited = now - began;
        assert!((30 * SECOND..=45 * SECOND).contains(&waited), "{waited:?}");
    }

    #[test]
    fn what_fails_together_counts_once_and_rests_are_bounded() {
        let (addresses, now) = (two(), Instant::now());
        let failures = || addresses.all()[0].failures;
        for _ in 0..8 {
            addresses.with(0, |a| a.fail(now, now + SECOND, Rest::Any));
        }
        assert_eq!(failures(), 1);
        addresses.with(0, |a| a.fail(now + 2 * SECOND, now + 3 * SECOND, Rest::Any));
        assert_eq!(failures(), 2);
        assert_eq!([1, 2, 3, 7, 99].map(bound).map(|d| d.as_millis()), [500, 1000, 2000, 30000, 30000]);
        let (least, most) = (0..1000).map(|_| random()).fold((1.0_f64, 0.0_f64), |(l, m), r| (l.min(r), m.max(r)));
        assert!(least < 0.1 && most > 0.9 && least >= 0.0 && most <= 1.0, "{least} {most}");
    }
}
