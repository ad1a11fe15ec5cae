//! The clients of the demo: an application that writes all the time, and knows what was promised to it.
//!
//! Each client runs one transaction after the other at a steady rate, and writes its next ticket into
//! `shop.receipts` in the same transaction. A ticket whose COMMIT was acknowledged must be found after the move; one
//! whose COMMIT was interrupted may be there or not, and is never used again.
//!
//! A client behaves as an application would: it keeps its connection, and when anything fails it counts the error, reads
//! the address again and connects anew. It never looks at the move.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Config, Statement};
use tokio_util::sync::CancellationToken;

use super::figures::Sample;
use super::schema::Scale;
use super::servers::{connect, write_private};
use crate::error::{Class, Doing, Error, Result};

/// How many clients there are.
pub const CLIENTS: i32 = 4;

/// Each client starts a transaction this often, as long as the last one is over.
const RHYTHM: Duration = Duration::from_millis(10);

/// After an error a client waits this long before it connects again.
const RECONNECT_DELAY: Duration = Duration::from_millis(10);

/// A client that cannot end its transaction within this after the end of the load is given up.
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// Where the application finds its database; a file, so that the switch is one rename.
#[derive(Clone, Debug)]
pub struct AddressFile(PathBuf);

impl AddressFile {
    /// In this file.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Sends everyone who reads it from now on to another server, atomically. Holds a password: only the owner may read it.
    ///
    /// # Errors
    /// The machine's.
    pub fn write(&self, address: &str) -> Result<()> {
        let partial = self.0.with_extension("partial");
        write_private(&partial, address)?;
        std::fs::rename(&partial, &self.0).doing(|| "switching the address")
    }

    fn read(&self) -> Result<Config> {
        let text = std::fs::read_to_string(&self.0).doing(|| "reading the address")?;
        Config::from_str(&text).map_err(|_| Error::bug(format!("no address in {}", self.0.display())))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// What one client saw.
#[derive(Clone, Debug, Default)]
pub struct ClientRecord {
    /// Tickets whose COMMIT was acknowledged, ascending.
    pub acknowledged: Vec<i64>,
    /// Tickets whose COMMIT was sent and never answered.
    pub unanswered: Vec<i64>,
    /// One for each acknowledged transaction.
    pub samples: Vec<Sample>,
}

/// What all clients saw.
#[derive(Clone, Debug, Default)]
pub struct Record {
    /// By client number, from 0.
    pub clients: Vec<ClientRecord>,
    /// How often each error came, by its text.
    pub errors: BTreeMap<String, u64>,
}

impl Record {
    /// The samples of all clients.
    #[must_use]
    pub fn samples(&self) -> Vec<Sample> {
        self.clients.iter().flat_map(|client| client.samples.iter().copied()).collect()
    }

    /// How many transactions were acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> usize {
        self.clients.iter().map(|client| client.acknowledged.len()).sum()
    }

    /// How many errors the clients saw.
    #[must_use]
    pub fn error_count(&self) -> u64 {
        self.errors.values().sum()
    }
}

/// The running clients. Dropping it ends them at once.
pub struct Load {
    stop: CancellationToken,
    clients: JoinSet<(i32, ClientRecord)>,
    shared: Arc<Shared>,
}

struct Shared {
    address: AddressFile,
    scale: Scale,
    acknowledged: AtomicU64,
    errors: Mutex<BTreeMap<String, u64>>,
}

impl Load {
    /// Starts the clients.
    #[must_use]
    pub fn start(address: AddressFile, scale: Scale) -> Self {
        let stop = CancellationToken::new();
        let shared =
            Arc::new(Shared { address, scale, acknowledged: AtomicU64::new(0), errors: Mutex::new(BTreeMap::new()) });
        let mut clients = JoinSet::new();
        for number in 0..CLIENTS {
            let worker = Worker {
                number,
                next_ticket: 1,
                chance: Chance::new(number),
                shared: Arc::clone(&shared),
                record: ClientRecord::default(),
            };
            clients.spawn(worker.run(stop.clone()));
        }
        Self { stop, clients, shared }
    }

    /// Acknowledged transactions so far.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// Lets every client end its transaction, and hands over what they saw.
    ///
    /// # Errors
    /// A client did not end, or panicked: its record would be missing from the proof.
    pub async fn stop(mut self) -> Result<Record> {
        self.stop.cancel();
        let mut clients = vec![ClientRecord::default(); self.clients.len()];
        let all = async {
            while let Some(ended) = self.clients.join_next().await {
                let (number, record) = ended.map_err(|error| Error::bug(format!("a client of the load: {error}")))?;
                if let Some(place) = usize::try_from(number).ok().and_then(|number| clients.get_mut(number)) {
                    *place = record;
                }
            }
            Ok::<_, Error>(())
        };
        tokio::time::timeout(STOP_DEADLINE, all).await.map_err(|_| {
            Error::new(Class::No, "client_stuck", "a client still waits for an answer from its server")
                .doing("stopping the load")
        })??;
        let errors = self.shared.errors.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Record { clients, errors })
    }
}

struct Worker {
    number: i32,
    next_ticket: i64,
    chance: Chance,
    shared: Arc<Shared>,
    record: ClientRecord,
}

impl Worker {
    async fn run(mut self, stop: CancellationToken) -> (i32, ClientRecord) {
        let mut rhythm = tokio::time::interval(RHYTHM);
        rhythm.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut session = None;
        while !stop.is_cancelled() {
            rhythm.tick().await;
            if let Err(error) = self.step(&mut session).await {
                self.count(&error);
                session = None;
                tokio::time::sleep(RECONNECT_DELAY).await;
            }
        }
        (self.number, self.record)
    }

    async fn step(&mut self, session: &mut Option<AppSession>) -> Result<()> {
        let session = match session {
            Some(session) => session,
            None => session.insert(AppSession::open(&self.shared.address).await?),
        };
        self.transact(session).await
    }

    async fn transact(&mut self, session: &mut AppSession) -> Result<()> {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let work = Work::pick(&mut self.chance, self.shared.scale);

        let began = Instant::now();
        let transaction = session.client.transaction().await?;
        work.run(&transaction, &session.statements).await?;
        transaction.execute(&session.statements.receipt, &[&self.number, &ticket, &work.name()]).await?;
        if let Err(error) = transaction.commit().await {
            // A server that answers with an error has not committed; one that does not answer may have.
            if error.as_db_error().is_none() {
                self.record.unanswered.push(ticket);
            }
            return Err(error.into());
        }
        let acknowledged = Instant::now();
        self.record.acknowledged.push(ticket);
        self.record.samples.push(Sample { acknowledged, latency: acknowledged - began });
        self.shared.acknowledged.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn count(&self, error: &Error) {
        let mut errors = self.shared.errors.lock().unwrap_or_else(PoisonError::into_inner);
        *errors.entry(error.to_string()).or_default() += 1;
    }
}

struct AppSession {
    client: Client,
    statements: Statements,
}

impl AppSession {
    async fn open(address: &AddressFile) -> Result<Self> {
        let client = connect(&address.read()?).await?;
        let statements = Statements::prepare(&client).await?;
        Ok(Self { client, statements })
    }
}

/// The application's statements, prepared once in a session.
struct Statements {
    receipt: Statement,
    lock_accounts: Statement,
    transfer: Statement,
    order: Statement,
    item: Statement,
    event: Statement,
    profile: Statement,
    order_state: Statement,
    return_order: Statement,
    fill_cart: Statement,
    empty_cart: Statement,
}

impl Statements {
    async fn prepare(client: &Client) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            receipt: client.prepare("INSERT INTO shop.receipts (client, ticket, kind) VALUES ($1, $2, $3)").await?,
            // In the order of the keys, so that two transfers never wait for each other.
            lock_accounts: client
                .prepare("SELECT FROM bank.account WHERE id = ANY (ARRAY[$1, $2]::bigint[]) ORDER BY id FOR UPDATE")
                .await?,
            transfer: client
                .prepare(
                    "UPDATE bank.account SET balance = balance + CASE id WHEN $1 THEN - $3::bigint ELSE $3 END
                     WHERE id = ANY (ARRAY[$1, $2]::bigint[])",
                )
                .await?,
            order: client
                .prepare(
                    "INSERT INTO shop.orders (invoice, customer_id, details, delivery)
                     VALUES (nextval('shop.invoice_number'), $1, jsonb_build_object('channel', 'live', 'client', $2::int),
                         tstzrange(now(), now() + interval '2 days'))
                     RETURNING id",
                )
                .await?,
            item: client
                .prepare(
                    "INSERT INTO shop.order_item (order_id, line, sku, quantity, price)
                     SELECT $1, $2, sku, $4, price FROM shop.product WHERE sku = 'SKU-' || $3::bigint",
                )
                .await?,
            event: client
                .prepare(
                    "INSERT INTO shop.event (customer_id, kind, payload)
                     VALUES ($1, 'live', jsonb_build_object('page', '/p/' || $2::bigint, 'trace', md5($2::text)))",
                )
                .await?,
            profile: client
                .prepare(
                    "UPDATE shop.customer
                     SET profile = jsonb_set(profile, '{visits}', to_jsonb((profile->>'visits')::int + 1)), tags = tags || $2::text
                     WHERE id = $1",
                )
                .await?,
            order_state: client
                .prepare("UPDATE shop.orders SET state = 'paid' WHERE id = $1 AND state = 'new'")
                .await?,
            // Its items go with it, and the audit trail remembers it.
            return_order: client
                .prepare(
                    "WITH gone AS (DELETE FROM shop.orders WHERE id = $1 RETURNING id)
                     SELECT nextval('shop.\"Return Number\"') FROM gone",
                )
                .await?,
            fill_cart: client
                .prepare("INSERT INTO shop.cart (session, sku) VALUES (md5($1::bigint::text), 'SKU-' || $1)")
                .await?,
            empty_cart: client
                .prepare("DELETE FROM shop.cart WHERE ctid = (SELECT ctid FROM shop.cart ORDER BY added_at LIMIT 1)")
                .await?,
        })
    }
}

/// What a transaction does.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Work {
    Transfer { from: i64, to: i64, cents: i64 },
    Order { customer: i64, products: Vec<i64> },
    Events { customer: i64, count: i64 },
    Profile { customer: i64 },
    OrderState { order: i64 },
    ReturnOrder { order: i64 },
    Cart { product: i64 },
}

impl Work {
    fn pick(chance: &mut Chance, scale: Scale) -> Self {
        let customer = chance.up_to(scale.customers);
        match chance.up_to(100) {
            1..=40 => {
                let to = chance.up_to(scale.customers);
                Self::Transfer { from: customer, to, cents: chance.up_to(500) }
            }
            41..=60 => {
                let lines = chance.up_to(4);
                Self::Order { customer, products: (0..lines).map(|_| chance.up_to(super::schema::PRODUCTS)).collect() }
            }
            61..=75 => Self::Events { customer, count: chance.up_to(5) },
            76..=87 => Self::Profile { customer },
            88..=93 => Self::OrderState { order: chance.up_to(scale.orders) },
            94..=96 => Self::ReturnOrder { order: chance.up_to(scale.orders) },
            _ => Self::Cart { product: chance.up_to(super::schema::PRODUCTS) },
        }
    }

    const fn name(&self) -> &'static str {
        match self {
            Self::Transfer { .. } => "transfer",
            Self::Order { .. } => "order",
            Self::Events { .. } => "events",
            Self::Profile { .. } => "profile",
            Self::OrderState { .. } => "order state",
            Self::ReturnOrder { .. } => "return",
            Self::Cart { .. } => "cart",
        }
    }

    async fn run(
        &self,
        transaction: &tokio_postgres::Transaction<'_>,
        statements: &Statements,
    ) -> Result<(), tokio_postgres::Error> {
        match self {
            Self::Transfer { from, to, .. } if from == to => {}
            Self::Transfer { from, to, cents } => {
                transaction.execute(&statements.lock_accounts, &[from, to]).await?;
                transaction.execute(&statements.transfer, &[from, to, cents]).await?;
            }
            Self::Order { customer, products } => {
                let channel = i32::try_from(products.len()).unwrap_or(0);
                let order: i64 = transaction.query_one(&statements.order, &[customer, &channel]).await?.try_get(0)?;
                for (line, product) in (1_i32..).zip(products) {
                    let parameters: [&(dyn ToSql + Sync); 4] = [&order, &line, product, &(1 + line % 3)];
                    transaction.execute(&statements.item, &parameters).await?;
                }
            }
            Self::Events { customer, count } => {
                for n in 0..*count {
                    transaction.execute(&statements.event, &[customer, &(customer * 7 + n)]).await?;
                }
            }
            Self::Profile { customer } => {
                transaction.execute(&statements.profile, &[customer, &"visited"]).await?;
            }
            Self::OrderState { order } => {
                transaction.execute(&statements.order_state, &[order]).await?;
            }
            Self::ReturnOrder { order } => {
                transaction.execute(&statements.return_order, &[order]).await?;
            }
            Self::Cart { product } => {
                transaction.execute(&statements.fill_cart, &[product]).await?;
                transaction.execute(&statements.empty_cart, &[]).await?;
            }
        }
        Ok(())
    }
}

/// Numbers that look like chance and are the same in every run (xorshift64).
struct Chance(u64);

impl Chance {
    fn new(client: i32) -> Self {
        Self(0x9e37_79b9_7f4a_7c15 ^ (u64::from(client.unsigned_abs()) + 1).wrapping_mul(0x2545_f491_4f6c_dd1d))
    }

    /// `1..=most`
    fn up_to(&mut self, most: u64) -> i64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        i64::try_from(1 + self.0 % most.max(1)).unwrap_or(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_work_comes_up_and_stays_in_range() {
        let scale = Scale::from_rows(1000);
        let mut chance = Chance::new(0);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..2000 {
            let work = Work::pick(&mut chance, scale);
            seen.insert(work.name());
            if let Work::Transfer { from, to, cents } = work {
                let accounts = 1..=i64::try_from(scale.customers).unwrap();
                assert!(accounts.contains(&from) && accounts.contains(&to) && (1..=500).contains(&cents));
            }
        }
        assert_eq!(seen.len(), 7, "{seen:?}");
    }

    #[test]
    fn the_address_is_switched_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let address = AddressFile::new(folder.path().join("address"));
        address.write("host=127.0.0.1 port=1 user=a").unwrap();
        address.write("host=127.0.0.1 port=2 user=b").unwrap();
        let config = address.read().unwrap();
        assert_eq!(config.get_ports(), [2]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }
}
