//! What server and workers tell of a measurement, and what is made of it.

use super::children::Line;
use super::statistics::Estimate;

/// Updates as the workers saw them: the moments at which they had been answered.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Updates {
    /// Seconds, ascending; the first is where the measurement begins.
    pub(super) moments: Vec<f64>,
    /// UDP payload per update, of those that the server counted meanwhile.
    pub(super) bytes_up: Option<u64>,
    pub(super) bytes_down: Option<u64>,
}

impl Updates {
    /// Updates per second of `workers` together.
    pub(super) fn rate(&self, workers: u32) -> Option<Estimate> {
        Estimate::rate(&self.moments, workers as usize)
    }
}

/// What the server said last.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Standing {
    done: u64,
    bytes_up: u64,
    bytes_down: u64,
}

/// What was heard so far.
#[derive(Debug)]
pub(super) struct Seen {
    /// How often each worker was answered.
    answers: Vec<u64>,
    /// All of them.
    pub(super) all: u64,
    /// A worker that is none of those there were at first: somebody lost its place.
    has_stranger: bool,
    /// From the moment on at which the last worker had been answered once.
    moments: Vec<f64>,
    /// How often the server said where it stands.
    pub(super) told: u64,
    /// Where it stood first after that moment, and last.
    standings: Option<(Standing, Standing)>,
}

impl Seen {
    pub(super) fn new(workers: u32) -> Self {
        Self {
            answers: vec![0; workers as usize],
            all: 0,
            has_stranger: false,
            moments: Vec::new(),
            told: 0,
            standings: None,
        }
    }

    pub(super) fn take(&mut self, line: &Line) {
        match *line {
            Line::Join(_) => {}
            Line::Update { seconds, worker } => {
                self.all += 1;
                match self.answers.get_mut(worker as usize) {
                    Some(answers) => *answers += 1,
                    None => self.has_stranger = true,
                }
                if self.is_warm() {
                    self.moments.push(seconds);
                }
            }
            Line::Progress { done, bytes_up, bytes_down } => {
                self.told += 1;
                let now = Standing { done, bytes_up, bytes_down };
                if self.is_warm() {
                    self.standings = Some((self.standings.map_or(now, |(first, _)| first), now));
                }
            }
        }
    }

    /// How many workers have been answered.
    pub(super) fn answered(&self) -> usize {
        self.answers.iter().filter(|&&answers| answers > 0).count()
    }

    /// Whether all have.
    pub(super) fn is_warm(&self) -> bool {
        self.answered() == self.answers.len()
    }

    /// Updates after the first moment.
    pub(super) fn updates(&self) -> u64 {
        (self.moments.len() as u64).saturating_sub(1)
    }

    /// From the first moment to the last.
    pub(super) fn seconds(&self) -> f64 {
        self.moments.last().zip(self.moments.first()).map_or(0.0, |(last, first)| last - first)
    }

    /// Whether the server knows of the updates that the workers counted.
    ///
    /// # Errors
    /// What is amiss, in words.
    pub(super) fn check(&self, counted: u64) -> Result<(), String> {
        let done = self.standings.map_or(0, |(_, last)| last.done);
        if self.has_stranger || done < counted {
            return Err(format!(
                "a worker lost its place: the workers counted {counted} updates, the server {done}"
            ));
        }
        Ok(())
    }

    pub(super) fn conclude(mut self) -> Updates {
        // Two workers may have told theirs in the other order; what lies before the beginning is no part of it.
        let begun = self.moments.first().copied().unwrap_or(0.0);
        self.moments.retain(|&moment| moment >= begun);
        self.moments.sort_by(f64::total_cmp);
        let of = |bytes: fn(&Standing) -> u64| {
            let (first, last) = self.standings.as_ref()?;
            (bytes(last) - bytes(first)).checked_div(last.done - first.done)
        };
        let (bytes_up, bytes_down) = (of(|standing| standing.bytes_up), of(|standing| standing.bytes_down));
        Updates { moments: self.moments, bytes_up, bytes_down }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(seconds: f64, worker: u32) -> Line {
        Line::Update { seconds, worker }
    }

    fn seen(lines: &[Line]) -> Seen {
        let mut seen = Seen::new(2);
        lines.iter().for_each(|line| seen.take(line));
        seen
    }

    #[test]
    fn counting_begins_when_every_worker_was_answered() {
        let begun = [update(1.0, 0), update(2.0, 0)];
        assert!(!seen(&begun).is_warm());
        let progress = |done| Line::Progress { done, bytes_up: 100 + 10 * done, bytes_down: 200 + 40 * done };
        let lines = [
            update(1.0, 0),
            progress(1),
            update(2.0, 0),
            update(3.0, 1),
            progress(3),
            update(4.5, 1),
            update(4.0, 0),
            progress(5),
        ];
        let seen = seen(&lines);
        assert_eq!((seen.updates(), seen.told), (2, 3));
        assert!(seen.check(5).is_ok());
        let updates = seen.conclude();
        assert_eq!(updates.moments, [3.0, 4.0, 4.5]);
        assert_eq!((updates.bytes_up, updates.bytes_down), (Some(10), Some(40)));
        assert_eq!(updates.rate(2).unwrap().value, 2.0 / 1.5);
    }

    #[test]
    fn updates_that_the_server_does_not_know_spoil_a_measurement() {
        let progress = Line::Progress { done: 2, bytes_up: 0, bytes_down: 0 };
        let lines = [update(1.0, 0), update(2.0, 1), update(3.0, 1), progress.clone()];
        let reason = seen(&lines).check(3).unwrap_err();
        assert!(reason.contains("3 updates, the server 2"), "{reason}");
        let stranger = [update(1.0, 0), update(2.0, 1), update(2.5, 2), progress];
        assert!(seen(&stranger).check(2).is_err());
    }
}
