//! A bad network for UDP, in this process: what passes between workers and a server is lost, delayed, doubled, reordered,
//! squeezed and cut off, by a seed; and the workers' ports change as those behind a router do.
//!
//! Each client is shown to the server as a socket of its own, and has a link of its own in each direction; besides, all can
//! share the server's. All settings can be changed while it runs.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand_chacha::ChaCha12Rng;
use sanderling_common::init::{Purpose, stream, uniform};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::warn;

/// Larger than any datagram.
const DATAGRAM_BYTES_MAX: usize = 65_536;

/// Datagrams that a link holds at a time; what comes beyond is lost.
const HELD_MAX: usize = 4096;

/// Clients that are relayed at a time; others are not heard.
const CLIENTS_MAX: usize = 1024;

/// A client that has said nothing for so long is gone: longer than any connection lasts in silence.
const CLIENT_IDLE: Duration = Duration::from_secs(90);

/// What a link does to datagrams, in each direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conditions {
    /// The probability that one is lost.
    pub loss: f64,
    /// That it comes twice.
    pub duplicates: f64,
    /// That it is held back for `held_back`, so that later ones overtake it.
    pub reordering: f64,
    /// How long.
    pub held_back: Duration,
    /// How long each takes.
    pub delay: Duration,
    /// And up to so much longer, each for itself.
    pub jitter: Duration,
    /// Bytes per second; `None`: as many as there are.
    pub bytes_per_second: Option<f64>,
    /// Bytes per second of all clients together, on the server's own link.
    pub shared_bytes_per_second: Option<f64>,
    /// Bytes that wait for their turn on a link that is full, a client's or the shared one; what comes beyond is lost.
    pub queue_bytes: usize,
    /// Nothing passes.
    pub is_cut: bool,
}

impl Default for Conditions {
    /// A perfect link.
    fn default() -> Self {
        Self {
            loss: 0.0,
            duplicates: 0.0,
            reordering: 0.0,
            held_back: Duration::from_millis(20),
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            bytes_per_second: None,
            shared_bytes_per_second: None,
            queue_bytes: 256 << 10,
            is_cut: false,
        }
    }
}

/// What a relay did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Datagrams passed on.
    pub forwarded: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Lost at random.
    pub lost: u64,
    /// Passed on twice.
    pub duplicated: u64,
    /// Held back.
    pub held_back: u64,
    /// Lost because the link was full.
    pub overflowed: u64,
    /// Lost while it was cut.
    pub cut_off: u64,
    /// Ports that were changed, of clients that had said something since the last change.
    pub rebinds: u64,
    /// Not passed on because there were too many clients.
    pub unheard: u64,
}

#[derive(Debug, Default)]
struct Counters {
    forwarded: AtomicU64,
    bytes: AtomicU64,
    lost: AtomicU64,
    duplicated: AtomicU64,
    held_back: AtomicU64,
    overflowed: AtomicU64,
    cut_off: AtomicU64,
    rebinds: AtomicU64,
    unheard: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A relay to one server; it ends when it is dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    conditions: watch::Sender<Conditions>,
    /// How often all clients' ports were to change.
    rebinds: watch::Sender<u64>,
    counters: Arc<Counters>,
    _tasks: JoinSet<()>,
}

impl Relay {
    /// Listens on a port of its own, and relays to `server` and back.
    ///
    /// # Errors
    /// If the system gives no socket.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn start(server: SocketAddr, conditions: Conditions, seed: u64) -> io::Result<Self> {
        let front = Arc::new(UdpSocket::bind((server.ip(), 0)).await?);
        let address = front.local_addr()?;
        let (conditions, seen) = watch::channel(conditions);
        let (rebinds, rebind) = watch::channel(0);
        let counters = Arc::new(Counters::default());
        let shared = [(); 2].map(|()| Arc::new(Mutex::new(Line::new())));
        let link = Link { server, front, conditions: seen, rebind, counters: counters.clone(), seed, shared };
        let mut tasks = JoinSet::new();
        tasks.spawn(relay(link));
        Ok(Self { address, conditions, rebinds, counters, _tasks: tasks })
    }

    /// Where clients find it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what the links do, from now on.
    pub fn set(&self, change: impl FnOnce(&mut Conditions)) {
        self.conditions.send_modify(change);
    }

    /// Shows every client to the server under another port, from now on, also in the middle of an exchange. What the server
    /// sends to the old ones is lost.
    pub fn rebind(&self) {
        self.rebinds.send_modify(|rebinds| *rebinds += 1);
    }

    /// What it did so far.
    pub fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { forwarded, bytes, lost, duplicated, held_back, overflowed, cut_off, rebinds, unheard } =
            &*self.counters;
        Counts {
            forwarded: read(forwarded),
            bytes: read(bytes),
            lost: read(lost),
            duplicated: read(duplicated),
            held_back: read(held_back),
            overflowed: read(overflowed),
            cut_off: read(cut_off),
            rebinds: read(rebinds),
            unheard: read(unheard),
        }
    }
}

/// What the clients' tasks share.
#[derive(Clone)]
struct Link {
    server: SocketAddr,
    front: Arc<UdpSocket>,
    conditions: watch::Receiver<Conditions>,
    rebind: watch::Receiver<u64>,
    counters: Arc<Counters>,
    seed: u64,
    /// The server's own link, up and down.
    shared: [Arc<Mutex<Line>>; 2],
}

async fn relay(link: Link) {
    let mut clients: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut tasks = JoinSet::new();
    let (mut number, mut told) = (0, false);
    let mut datagram = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        // A client whose port is closed makes the socket say so; the others are still there.
        let Ok((length, client)) = link.front.recv_from(&mut datagram).await else { continue };
        if clients.get(&client).is_none_or(mpsc::Sender::is_closed) {
            clients.retain(|_, sender| !sender.is_closed());
            while tasks.try_join_next().is_some() {}
            if clients.len() == CLIENTS_MAX {
                count(&link.counters.unheard);
                if !std::mem::replace(&mut told, true) {
                    warn!("the relay has {CLIENTS_MAX} clients; others, such as {client}, are not heard");
                }
                continue;
            }
            let (sender, receiver) = mpsc::channel(HELD_MAX);
            tasks.spawn(serve(link.clone(), client, number, receiver));
            number += 1;
            clients.insert(client, sender);
        }
        if clients[&client].try_send(datagram[..length].to_vec()).is_err() {
            count(&link.counters.overflowed);
        }
    }
}

/// A datagram on its way.
struct Held {
    due: Instant,
    order: u64,
    bytes: Vec<u8>,
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Held {}

impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Held {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.order).cmp(&(other.due, other.order))
    }
}

/// What passes bytes on at a rate, one after another.
#[derive(Debug)]
struct Line {
    /// When it is done with what it has.
    free_at: Instant,
}

impl Line {
    fn new() -> Self {
        Self { free_at: Instant::now() }
    }

    /// Puts bytes that come at `at` behind what it has; returns when they are through, or `None` if too much waits there.
    fn take(&mut self, bytes: usize, at: Instant, rate: Option<f64>, queue_bytes: usize) -> Option<Instant> {
        let Some(rate) = rate else {
            self.free_at = at;
            return Some(at);
        };
        let waiting = self.free_at.saturating_duration_since(at).as_secs_f64() * rate;
        if waiting > queue_bytes as f64 {
            return None;
        }
        self.free_at = self.free_at.max(at) + Duration::from_secs_f64(bytes as f64 / rate);
        Some(self.free_at)
    }
}

/// One direction of a client's link.
struct Direction {
    rng: ChaCha12Rng,
    counters: Arc<Counters>,
    held: BinaryHeap<Reverse<Held>>,
    own: Line,
    shared: Arc<Mutex<Line>>,
    order: u64,
}

impl Direction {
    fn new(rng: ChaCha12Rng, counters: Arc<Counters>, shared: Arc<Mutex<Line>>) -> Self {
        Self { rng, counters, held: BinaryHeap::new(), own: Line::new(), shared, order: 0 }
    }

    /// When bytes that come now are through both links.
    fn pass(&mut self, bytes: usize, conditions: &Conditions) -> Option<Instant> {
        let &Conditions { bytes_per_second, shared_bytes_per_second, queue_bytes, .. } = conditions;
        let at = self.own.take(bytes, Instant::now(), bytes_per_second, queue_bytes)?;
        let mut shared = self.shared.lock().expect("nobody panics with it");
        shared.take(bytes, at, shared_bytes_per_second, queue_bytes)
    }

    fn happens(&mut self, probability: f64) -> bool {
        uniform(&mut self.rng) < probability
    }

    /// Takes a datagram in.
    fn take(&mut self, bytes: &[u8], conditions: &Conditions) {
        if conditions.is_cut {
            return count(&self.counters.cut_off);
        }
        if self.happens(conditions.loss) {
            return count(&self.counters.lost);
        }
        let Some(through) = self.pass(bytes.len(), conditions) else {
            return count(&self.counters.overflowed);
        };
        let again = self.happens(conditions.duplicates);
        if again {
            count(&self.counters.duplicated);
        }
        for _ in 0..1 + u32::from(again) {
            let mut delay = conditions.delay + conditions.jitter.mul_f64(uniform(&mut self.rng));
            if self.happens(conditions.reordering) {
                count(&self.counters.held_back);
                delay += conditions.held_back;
            }
            if self.held.len() == HELD_MAX {
                return count(&self.counters.overflowed);
            }
            self.order += 1;
            self.held.push(Reverse(Held { due: through + delay, order: self.order, bytes: bytes.to_vec() }));
        }
    }

    /// The next datagram that is due, when it is.
    async fn due(&mut self) -> Vec<u8> {
        let Some(Reverse(next)) = self.held.peek() else { return std::future::pending().await };
        tokio::time::sleep_until(next.due).await;
        let Reverse(Held { bytes, .. }) = self.held.pop().expect("it was there a moment ago");
        count(&self.counters.forwarded);
        self.counters.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        bytes
    }
}

/// Relays what one client says and is told, until it has been silent for [`CLIENT_IDLE`].
async fn serve(mut link: Link, client: SocketAddr, number: u64, mut said: mpsc::Receiver<Vec<u8>>) {
    let direction = |place: usize| {
        let rng = stream(link.seed, Purpose::Simulation, 2 * number + place as u64);
        Direction::new(rng, link.counters.clone(), link.shared[place].clone())
    };
    let (mut up, mut down) = (direction(0), direction(1));
    let Ok(mut back) = UdpSocket::bind((link.server.ip(), 0)).await else { return };
    link.rebind.mark_unchanged();
    let (mut heard, mut gone_at) = (false, Instant::now() + CLIENT_IDLE);
    let mut datagram = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        tokio::select! {
            bytes = said.recv() => match bytes {
                Some(bytes) => {
                    (heard, gone_at) = (true, Instant::now() + CLIENT_IDLE);
                    up.take(&bytes, &link.conditions.borrow().clone());
                }
                None => return,
            },
            () = tokio::time::sleep_until(gone_at) => return,
            // A server whose port is closed makes the socket say so; another may come.
            received = back.recv_from(&mut datagram) => if let Ok((length, _)) = received {
                down.take(&datagram[..length], &link.conditions.borrow().clone());
            },
            // A socket that is gone loses the datagram too.
            bytes = up.due() => drop(back.send_to(&bytes, link.server).await),
            bytes = down.due() => drop(link.front.send_to(&bytes, client).await),
            changed = link.rebind.changed() => {
                if changed.is_err() {
                    return;
                }
                // One that is gone has no port to change.
                if std::mem::take(&mut heard)
                    && let Ok(another) = UdpSocket::bind((link.server.ip(), 0)).await
                {
                    count(&link.counters.rebinds);
                    back = another;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_passes_one_thing_after_another_and_holds_so_much() {
        let now = Instant::now();
        let mut line = Line { free_at: now };
        let (rate, queue) = (Some(1000.0), 1500);
        let after = |ms| Some(now + Duration::from_millis(ms));
        assert_eq!(line.take(1000, now, rate, queue), after(1000));
        assert_eq!(line.take(1000, now, rate, queue), after(2000));
        assert_eq!(line.take(1000, now, rate, queue), None, "2000 bytes wait");
        assert_eq!(line.take(1000, now + Duration::from_secs(1), rate, queue), after(3000));
        assert_eq!(line.take(1000, now, None, queue), after(0));
    }

    /// What two clients send at once arrives at the rate of the link that they share.
    #[tokio::test]
    async fn clients_share_the_servers_link() {
        let conditions = Conditions { shared_bytes_per_second: Some(1e4), ..Conditions::default() };
        let shared = Arc::new(Mutex::new(Line::new()));
        let clients = [0, 1].map(|number| {
            let rng = stream(1, Purpose::Simulation, number);
            Direction::new(rng, Arc::new(Counters::default()), shared.clone())
        });
        let begun = Instant::now();
        for mut client in clients {
            client.take(&[0; 500], &conditions);
            client.due().await;
        }
        assert!(begun.elapsed() >= Duration::from_millis(100), "{:?}", begun.elapsed());
    }

    /// A client that is heard of no more has no port to change.
    #[tokio::test]
    async fn only_ports_of_clients_that_speak_are_changed() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let relay = Relay::start(server.local_addr().unwrap(), Conditions::default(), 1).await.unwrap();
        let clients = [(); 2].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let speak = async |client: &std::net::UdpSocket| {
            client.send_to(b"here", relay.address()).unwrap();
            server.recv_from(&mut [0; 16]).await.unwrap();
        };
        let changed = async |rebinds| {
            relay.rebind();
            while relay.counts().rebinds < rebinds {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        speak(&clients[0]).await;
        speak(&clients[1]).await;
        changed(2).await;
        speak(&clients[0]).await;
        changed(3).await;
        speak(&clients[0]).await;
        changed(4).await;
        assert_eq!(relay.counts().rebinds, 4);
    }
}
