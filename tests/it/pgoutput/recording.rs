//! The recorded streams: which there are, and their files.
//!
//! A file holds the messages of one stream in their order, each behind its length in four bytes, the highest first.

use std::fmt;
use std::path::{Path, PathBuf};

use bytes::{Buf, BufMut, Bytes};
use pgtandem::postgres::pgoutput::Protocol;

/// One recorded stream.
#[derive(Clone, Copy, Debug)]
pub struct Recording {
    /// The major version of the server.
    pub version: u16,
    /// What was agreed on.
    pub protocol: Protocol,
    /// Whether values were asked for in binary.
    pub binary: bool,
}

/// Each version with each protocol that it speaks; binary values once from each version that has them.
pub fn recordings() -> Vec<Recording> {
    let mut all = Vec::new();
    for version in crate::harness::VERSIONS {
        let mut protocols = vec![Protocol::V1];
        if version >= 14 {
            all.push(Recording { version, protocol: Protocol::V1, binary: true });
            protocols.push(Protocol::V2);
        }
        if version >= 15 {
            protocols.push(Protocol::V3);
        }
        if version >= 16 {
            protocols.extend([Protocol::V4 { parallel: false }, Protocol::V4 { parallel: true }]);
        }
        all.extend(protocols.into_iter().map(|protocol| Recording { version, protocol, binary: false }));
    }
    all
}

impl fmt::Display for Recording {
    /// As the file is called.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::V1 => "v1",
            Protocol::V2 => "v2",
            Protocol::V3 => "v3",
            Protocol::V4 { parallel: false } => "v4",
            Protocol::V4 { parallel: true } => "v4-parallel",
        };
        write!(f, "{}-{protocol}{}", self.version, if self.binary { "-binary" } else { "" })
    }
}

impl Recording {
    fn path(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/it/pgoutput/recorded/{self}.bin"))
    }

    /// What was recorded.
    pub fn messages(&self) -> Vec<Bytes> {
        let path = self.path();
        let mut rest = Bytes::from(std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())));
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let length = rest.get_u32() as usize;
            messages.push(rest.split_to(length));
        }
        messages
    }

    /// Replaces what was recorded before.
    pub fn write(&self, messages: &[Bytes]) {
        let mut content = Vec::new();
        for message in messages {
            content.put_u32(message.len() as u32);
            content.put_slice(message);
        }
        std::fs::write(self.path(), content).expect("write a recording");
    }
}
