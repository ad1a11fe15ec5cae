//! The moment of the switch: the hook of the cutover calls the demo, and the demo holds both sides as they are before it lets
//! its clients go on.
//!
//! When the hook runs, the source is fenced and the target has everything. So both sides must be equal right then, and
//! only then: a moment later the clients write to the target. The demo therefore opens a REPEATABLE READ snapshot on
//! both sides and reads the sequences, which no snapshot covers. That takes milliseconds; the long comparison
//! reads through these snapshots later.
//!
//! The hook is `pgtandem demo --switch SOCKET`: it says one line, and waits for one line.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio_postgres::Client;

use super::compare::{SequenceState, read_sequences};
use super::load::AddressFile;
use super::schema::DATABASE;
use super::servers::{Cluster, SUPERUSER};
use crate::error::{Class, Doing, Error, Result};

/// How long the hook waits for the demo.
const ANSWER_DEADLINE: Duration = Duration::from_secs(20);

const HOLD: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT FROM pg_catalog.pg_class LIMIT 1";

/// One side as it was at the switch.
pub struct Held {
    /// A session inside a transaction that sees the side as it was.
    pub client: Client,
    /// Every sequence, read at that moment.
    pub sequences: Vec<SequenceState>,
}

/// Both sides as they were at the switch.
pub struct Moment {
    /// The fenced source.
    pub source: Held,
    /// The target, before the first client wrote to it.
    pub target: Held,
    /// When the address was switched.
    pub switched: Instant,
    /// How much the demo's own look added to the write pause.
    pub took: Duration,
}

/// Waits for the hook, holds both sides, switches the address.
pub struct Switchboard {
    listener: UnixListener,
    socket: PathBuf,
}

impl Switchboard {
    /// Listens in `folder`.
    ///
    /// # Errors
    /// The machine's.
    pub fn open(folder: &Path) -> Result<Self> {
        let socket = folder.join("switch.sock");
        let listener = UnixListener::bind(&socket).doing(|| format!("listening on {}", socket.display()))?;
        Ok(Self { listener, socket })
    }

    /// Where the hook finds the demo.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Answers the first call of the hook: holds both sides, then sends the clients to the target.
    ///
    /// # Errors
    /// A side cannot be read; then the hook fails, and with it the cutover, and the clients stay on the source.
    pub async fn serve(self, source: &Cluster, target: &Cluster, address: &AddressFile, new: &str) -> Result<Moment> {
        // Sessions are ready before they are needed; what happens between the two lines lengthens the write pause.
        let ready_source = source.connect(SUPERUSER, DATABASE).await?;
        let ready_target = target.connect(SUPERUSER, DATABASE).await?;
        let (stream, _) = self.listener.accept().await.doing(|| "waiting for the hook")?;
        let called = Instant::now();
        let (reader, mut writer) = stream.into_split();
        let mut line = String::new();
        BufReader::new(reader).read_line(&mut line).await.doing(|| "hearing the hook")?;

        let held = tokio::try_join!(hold(source, ready_source), hold(target, ready_target))
            .and_then(|held| address.write(new).map(|()| held));
        match held {
            Ok((source, target)) => {
                let switched = Instant::now();
                writer.write_all(b"switched\n").await.doing(|| "answering the hook")?;
                Ok(Moment { source, target, switched, took: switched - called })
            }
            Err(error) => {
                writer.write_all(format!("error: {error}\n").as_bytes()).await.doing(|| "answering the hook")?;
                Err(error)
            }
        }
    }
}

/// The hook's side: asks the demo to switch, and comes back once it has.
///
/// # Errors
/// The demo is gone, or could not hold both sides.
pub async fn ask(socket: &Path) -> Result<()> {
    let conversation = async {
        let mut stream = UnixStream::connect(socket).await.doing(|| format!("calling {}", socket.display()))?;
        stream.write_all(b"switch\n").await.doing(|| "asking for the switch")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).await.doing(|| "waiting for the switch")?;
        match answer.trim_end() {
            "switched" => Ok(()),
            "" => Err(Error::new(Class::No, "demo_gone", "the demo ended before it switched")),
            other => Err(Error::new(Class::No, "not_switched", other.to_owned())),
        }
    };
    tokio::time::timeout(ANSWER_DEADLINE, conversation).await.map_err(|_| {
        Error::new(Class::No, "no_answer", format!("the demo did not answer within {ANSWER_DEADLINE:?}"))
    })?
}

/// In a new session if the waiting one was ended by the fence.
async fn hold(cluster: &Cluster, ready: Client) -> Result<Held> {
    let held = if ready.is_closed() || ready.simple_query("SELECT").await.is_err() {
        Held::open(cluster.connect(SUPERUSER, DATABASE).await?).await
    } else {
        Held::open(ready).await
    };
    held.doing(|| format!("holding {cluster}"))
}

impl Held {
    /// Holds what this session sees now.
    ///
    /// # Errors
    /// The connection's.
    pub async fn open(client: Client) -> Result<Self> {
        // The snapshot is taken by the first statement after BEGIN.
        client.batch_execute(HOLD).await?;
        let sequences = read_sequences(&client).await.doing(|| "reading the sequences")?;
        Ok(Self { client, sequences })
    }
}
