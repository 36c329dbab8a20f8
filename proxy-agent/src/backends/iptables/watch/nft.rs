//! What the kernel tells of changes of nftables (net/netfilter/nf_tables_api.c, `nft_commit_notify`): one message for each
//! chain and rule, and one with the number of the generation at the end of each transaction.

use std::io;

use crate::backends::nfnetlink::{
    ACK, Attributes, BUFFER_BYTES, Message, Requests, Socket, ask, kind,
};

const NFNLGRP_NFTABLES: u32 = 7;
const SUBSYSTEM: u8 = 10;
const DELTABLE: u16 = kind(SUBSYSTEM, 2);
const NEWCHAIN: u16 = kind(SUBSYSTEM, 3);
const DELCHAIN: u16 = kind(SUBSYSTEM, 5);
const NEWRULE: u16 = kind(SUBSYSTEM, 6);
const DELRULE: u16 = kind(SUBSYSTEM, 8);
const NEWGEN: u16 = kind(SUBSYSTEM, 15);
const GETGEN: u16 = kind(SUBSYSTEM, 16);

/// `NFTA_TABLE_NAME`, `NFTA_CHAIN_TABLE`, `NFTA_RULE_TABLE`.
const TABLE: u16 = 1;
/// `NFTA_CHAIN_NAME`.
const CHAIN_NAME: u16 = 3;
/// `NFTA_RULE_CHAIN`.
const RULE_CHAIN: u16 = 2;
/// `NFTA_GEN_ID`.
const GENERATION: u16 = 1;

/// `NFPROTO_IPV4` and `NFPROTO_IPV6`.
const FAMILIES: [u8; 2] = [2, 10];
const TABLES: [&[u8]; 2] = [b"filter", b"nat"];
/// How names of our chains begin.
const OURS: [&[u8]; 2] = [b"KUBE-", b"PROXY-AGENT-"];

/// Listens, except while we write: the kernel would write down each of our own rules for us.
#[derive(Debug)]
pub struct Watch {
    /// None while we write.
    listener: Option<Socket>,
    /// The last that is accounted for.
    generation: u32,
    buffer: Vec<u8>,
}

impl Watch {
    /// Begins to listen.
    pub fn open() -> io::Result<Self> {
        let mut watch = Self {
            listener: None,
            generation: 0,
            buffer: vec![0; BUFFER_BYTES],
        };
        watch.listener = Some(Socket::open(Some(NFNLGRP_NFTABLES))?);
        watch.generation = generation()?;
        Ok(watch)
    }

    /// Reads what has come; says whether it is about rules of ours.
    pub fn look(&mut self) -> io::Result<bool> {
        let Some(listener) = &self.listener else {
            return Ok(false);
        };
        let mut is_ours = false;
        loop {
            match listener.try_receive(&mut self.buffer) {
                Ok(None) => return Ok(is_ours),
                Ok(Some(messages)) => {
                    for message in messages {
                        is_ours |= concerns_us(message);
                        if let Some(generation) = generation_of(message) {
                            self.generation = generation;
                        }
                    }
                }
                // More was told than there was room for.
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {
                    self.listener = Some(Socket::open(Some(NFNLGRP_NFTABLES))?);
                    self.generation = generation()?;
                    return Ok(true);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Stops listening.
    pub fn pause(&mut self) {
        self.listener = None;
    }

    /// Listens again after `own` transactions of ours; says whether there were others.
    pub fn resume(&mut self, own: u32) -> io::Result<bool> {
        let expected = self.generation.wrapping_add(own);
        self.listener = Some(Socket::open(Some(NFNLGRP_NFTABLES))?);
        self.generation = generation()?;
        Ok(self.generation != expected)
    }
}

/// Number of the generation that is in force.
fn generation() -> io::Result<u32> {
    let mut requests = Requests::default();
    requests.push(GETGEN, ACK, 0, |_| {});
    let mut found = None;
    ask(&requests, |message| {
        found = generation_of(message).or(found)
    })?;
    found.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn generation_of(message: Message<'_>) -> Option<u32> {
    match message {
        Message::Data {
            kind: NEWGEN,
            attributes,
            ..
        } => attributes.u32(GENERATION),
        Message::Data { .. } | Message::Answer(_) | Message::Done => None,
    }
}

/// Whether a chain of ours, a rule in one, or a jump to one came or went.
fn concerns_us(message: Message<'_>) -> bool {
    let Message::Data {
        kind,
        family,
        attributes,
        flags: _,
    } = message
    else {
        return false;
    };
    let in_our_tables = || {
        let table = attributes.text(TABLE).unwrap_or_default();
        FAMILIES.contains(&family) && TABLES.contains(&table)
    };
    match kind {
        DELTABLE => in_our_tables(),
        NEWCHAIN | DELCHAIN => in_our_tables() && is_ours(attributes.text(CHAIN_NAME)),
        NEWRULE | DELRULE => {
            in_our_tables() && (is_ours(attributes.text(RULE_CHAIN)) || leads_to_us(attributes))
        }
        _ => false,
    }
}

fn is_ours(chain: Option<&[u8]>) -> bool {
    chain.is_some_and(|chain| OURS.iter().any(|prefix| chain.starts_with(prefix)))
}

/// A jump holds the name of its chain somewhere among the rule's expressions. A rule that has it elsewhere, in a comment,
/// costs one look at the tables.
fn leads_to_us(rule: Attributes<'_>) -> bool {
    let bytes = rule.bytes();
    OURS.iter()
        .any(|name| bytes.windows(name.len()).any(|window| window == *name))
}
