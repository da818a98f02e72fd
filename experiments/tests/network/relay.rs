//! A bad network between a worker and a server: loses datagrams at random, and all of them during a blackout.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sanderling_common::init::{Purpose, stream, uniform};
use sanderling_common::join::JoinString;
use tokio::net::UdpSocket;

/// Larger than any datagram.
const DATAGRAM_BYTES_MAX: usize = 65_536;

pub(crate) struct Relay {
    pub(crate) join: JoinString,
    blackout: Arc<AtomicBool>,
    lost: Arc<AtomicU64>,
}

impl Relay {
    /// Relays to the server of `join`, losing the stated share of datagrams in each direction.
    pub(crate) async fn start(join: &JoinString, loss: f64) -> Self {
        let server: SocketAddr = format!("{}:{}", join.host, join.port).parse().unwrap();
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let port = front.local_addr().unwrap().port();
        let (blackout, lost) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let link = Link { loss, blackout: blackout.clone(), lost: lost.clone() };
        tokio::spawn(relay(front, server, link));
        Self { join: JoinString { port, ..join.clone() }, blackout, lost }
    }

    pub(crate) fn set_blackout(&self, blackout: bool) {
        self.blackout.store(blackout, Ordering::Relaxed);
    }

    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

#[derive(Clone)]
struct Link {
    loss: f64,
    blackout: Arc<AtomicBool>,
    lost: Arc<AtomicU64>,
}

impl Link {
    async fn send(&self, chance: f64, socket: &UdpSocket, datagram: &[u8], to: SocketAddr) {
        if self.blackout.load(Ordering::Relaxed) || chance < self.loss {
            self.lost.fetch_add(1, Ordering::Relaxed);
        } else {
            // A socket that is gone loses the datagram too.
            let _ = socket.send_to(datagram, to).await;
        }
    }
}

/// Each worker is shown to the server as a socket of its own.
async fn relay(front: Arc<UdpSocket>, server: SocketAddr, link: Link) {
    let mut rng = stream(1, Purpose::Simulation, 0);
    let mut backs: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut datagram = vec![0; DATAGRAM_BYTES_MAX];
    while let Ok((length, worker)) = front.recv_from(&mut datagram).await {
        let back = match backs.entry(worker) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                tokio::spawn(relay_back(back.clone(), front.clone(), worker, link.clone()));
                new.insert(back)
            }
        };
        link.send(uniform(&mut rng), back, &datagram[..length], server).await;
    }
}

async fn relay_back(back: Arc<UdpSocket>, front: Arc<UdpSocket>, worker: SocketAddr, link: Link) {
    let mut rng = stream(1, Purpose::Simulation, u64::from(worker.port()));
    let mut datagram = vec![0; DATAGRAM_BYTES_MAX];
    while let Ok((length, _)) = back.recv_from(&mut datagram).await {
        link.send(uniform(&mut rng), &front, &datagram[..length], worker).await;
    }
}
