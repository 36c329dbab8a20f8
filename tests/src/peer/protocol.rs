//! What goes through the pipes of a helper process.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::survey::{Heard, Question};
use crate::load::{LoadPlan, LoadReport};

/// What a helper process is asked to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(super) enum Request {
    ServeTcp {
        address: SocketAddr,
        identity: String,
    },
    ServeSources {
        port: u16,
        identity: String,
    },
    ServeUdp {
        address: SocketAddr,
        identity: String,
    },
    AskSctp {
        to: SocketAddr,
        patience_ms: u64,
    },
    TcpOpen {
        to: SocketAddr,
        bind: Option<SocketAddr>,
        patience_ms: u64,
    },
    UdpOpen {
        bind: SocketAddr,
    },
    Connect {
        socket: u32,
        to: SocketAddr,
    },
    Send {
        socket: u32,
        to: Option<SocketAddr>,
        text: String,
    },
    Receive {
        socket: u32,
        patience_ms: u64,
    },
    PeerAddress {
        socket: u32,
    },
    Close {
        socket: u32,
    },
    Survey {
        questions: Vec<Question>,
        tries: usize,
    },
    StartLoad {
        plan: LoadPlan,
    },
    StopLoad {
        load: u32,
    },
}

/// What it answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub(super) enum Response {
    Done,
    Opened {
        number: u32,
    },
    Received {
        from: Option<SocketAddr>,
        text: String,
    },
    Address {
        address: SocketAddr,
    },
    Surveyed {
        heard: Vec<Heard>,
    },
    Load {
        report: LoadReport,
    },
    Failed {
        errno: Option<i32>,
        text: String,
    },
}
