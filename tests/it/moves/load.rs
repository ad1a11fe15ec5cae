//! Clients that never stop: pgbench, and sellers of tickets who remember each sale that was acknowledged.
//!
//! A seller who is refused or disconnected reconnects, as an application would: to the address that the hook wrote, once it
//! is there. On the new side sellers first wait at a gate, so that both sides can be compared as they were at the switch.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use super::stage::{LONG, Stage, pgbench};
use crate::harness::{Database, PATIENCE, assert_same, wait_until};

/// How many sell at once.
const SELLERS: i32 = 2;
/// The pause between two sales of one seller, so that the load leaves the machine to the move.
const PAUSE: Duration = Duration::from_millis(2);
/// The pause before a seller or pgbench tries again.
const RETRY: Duration = Duration::from_millis(20);

/// See the module's first lines.
pub struct Load {
    shared: Arc<Shared>,
    sellers: Vec<JoinHandle<()>>,
    pgbench: JoinHandle<()>,
}

struct Shared {
    source: Database,
    target: Database,
    address: PathBuf,
    /// Client and number of each ticket whose commit was acknowledged.
    sold: Mutex<Vec<(i32, i64)>>,
    /// Sales that the fence refused.
    refused: AtomicU64,
    /// Transactions that pgbench reports as processed.
    processed: AtomicU64,
    /// Sellers who wait at the gate.
    waiting: AtomicUsize,
    gate: watch::Sender<bool>,
    stop: CancellationToken,
}

impl Load {
    /// Starts the sellers and `pgbench -c 4`, with these further arguments.
    pub fn start(stage: &Stage, pgbench: &[&'static str]) -> Self {
        let shared = Arc::new(Shared {
            source: stage.source.clone(),
            target: stage.target.clone(),
            address: stage.file("address"),
            sold: Mutex::default(),
            refused: AtomicU64::new(0),
            processed: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            gate: watch::Sender::new(false),
            stop: CancellationToken::new(),
        });
        let arguments = [&["-n", "-c", "4", "-T", "3600"], pgbench].concat();
        let pgbench = Arc::clone(&shared).run_pgbench(stage.source_server.port(), arguments);
        Self {
            sellers: (0..SELLERS).map(|client| tokio::spawn(Arc::clone(&shared).sell(client))).collect(),
            pgbench: tokio::spawn(pgbench),
            shared,
        }
    }

    /// How many sales were acknowledged.
    pub fn sold(&self) -> usize {
        self.shared.sold.lock().expect("the sales").len()
    }

    /// Waits for sales: the side that takes writes takes them.
    pub async fn wait_for_sales(&self) {
        let before = self.sold();
        wait_until("tickets are sold", PATIENCE, async || self.sold() > before + 10).await;
    }

    /// After a cutover: both sides hold the same, nothing acknowledged is missing, nothing is there twice, and the
    /// target takes writes. Ends the load.
    pub async fn settle(self, stage: &Stage) {
        self.everyone_has_moved().await;
        assert_same(&stage.source, &stage.target).await;
        self.assert_nothing_lost(&stage.target).await;
        self.assert_pgbench_adds_up(&stage.target).await;
        self.shared.gate.send_replace(true);
        self.wait_for_sales().await;
        self.shared.stop.cancel();
        for seller in self.sellers {
            seller.await.expect("a seller");
        }
        let sold = self.shared.sold.lock().expect("the sales").clone();
        assert_sold(&sold, &stage.target).await;
    }

    async fn everyone_has_moved(&self) {
        let all = SELLERS as usize;
        let waiting = async || self.shared.waiting.load(Ordering::SeqCst) == all && self.pgbench.is_finished();
        wait_until("the sellers come to the new side and pgbench ends", LONG, waiting).await;
    }

    async fn assert_nothing_lost(&self, target: &Database) {
        let sold = self.shared.sold.lock().expect("the sales").clone();
        assert!(sold.len() > 10, "only {} tickets were sold", sold.len());
        assert_sold(&sold, target).await;
        let wrong =
            "select t.client from takings t where t.sold <> (select count(*) from tickets where client = t.client)";
        assert_eq!(target.query_strings(wrong).await, Vec::<String>::new(), "takings and tickets differ");
        println!("{} tickets sold, {} refused by the fence", sold.len(), self.shared.refused.load(Ordering::SeqCst));
    }

    /// Every transaction of pgbench changes four tables by the same amount.
    async fn assert_pgbench_adds_up(&self, target: &Database) {
        let processed = self.shared.processed.load(Ordering::SeqCst);
        let history: u64 = target.query_string("select count(*) from pgbench_history").await.parse().expect("a count");
        println!("pgbench processed {processed} transactions, its history holds {history}");
        assert!(history > 0 && history >= processed, "{processed} transactions processed, {history} in the history");
        let sums = "select (select sum(delta) from pgbench_history) = all (array[
            (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers),
            (select sum(bbalance) from pgbench_branches)])";
        assert_eq!(target.query_string(sums).await, "t", "the balances of pgbench do not add up");
    }
}

/// Each of these is there, and nothing is there twice.
async fn assert_sold(sold: &[(i32, i64)], database: &Database) {
    for table in ["tickets", "stubs"] {
        let mut found: HashMap<String, u32> = HashMap::new();
        for row in database.query_strings(&format!("select client, number from {table}")).await {
            *found.entry(row).or_default() += 1;
        }
        let twice: Vec<_> = found.iter().filter(|(_, count)| **count > 1).take(5).collect();
        assert!(twice.is_empty(), "{table} holds these more than once: {twice:?}");
        let missing: Vec<_> =
            sold.iter().filter(|(client, number)| !found.contains_key(&format!("{client}|{number}"))).collect();
        assert!(missing.is_empty(), "{} acknowledged {table} are missing, first {:?}", missing.len(), missing[0]);
    }
}

impl Shared {
    async fn sell(self: Arc<Self>, client: i32) {
        let mut number = 0;
        while let Some(session) = self.connect().await {
            while !self.stop.is_cancelled() {
                number += 1;
                // Whether a sale whose answer is lost took place, nobody knows: its number is not used again.
                match self.sell_one(&session, client, number).await {
                    Ok(()) => self.sold.lock().expect("the sales").push((client, number)),
                    Err(error) => {
                        if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) {
                            self.refused.fetch_add(1, Ordering::SeqCst);
                        }
                        break;
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn sell_one(&self, session: &Client, client: i32, number: i64) -> Result<(), tokio_postgres::Error> {
        let sale = format!(
            "begin;
             insert into tickets (client, number) values ({client}, {number});
             insert into stubs values ({client}, {number});
             update takings set sold = sold + 1 where client = {client};
             commit"
        );
        session.batch_execute(&sale).await
    }

    /// A session where the application belongs just now; none once the load ends.
    async fn connect(&self) -> Option<Client> {
        while !self.stop.is_cancelled() {
            let side = match self.moved() {
                true => self.pass_the_gate().await?,
                false => &self.source,
            };
            if let Ok(session) = side.try_connect().await {
                return Some(session);
            }
            tokio::time::sleep(RETRY).await;
        }
        None
    }

    async fn pass_the_gate(&self) -> Option<&Database> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut gate = self.gate.subscribe();
        tokio::select! {
            open = gate.wait_for(|open| *open) => open.is_ok().then_some(&self.target),
            () = self.stop.cancelled() => None,
        }
    }

    /// Whether the hook wrote the new address.
    fn moved(&self) -> bool {
        fs::read_to_string(&self.address).is_ok_and(|port| self.target.url().contains(&format!(":{port}/")))
    }

    /// Runs pgbench until the switch; again whenever a crash of the source ended it.
    async fn run_pgbench(self: Arc<Self>, port: u16, arguments: Vec<&str>) {
        while !self.stop.is_cancelled() && !self.moved() {
            let output = tokio::select! {
                output = pgbench(port, &arguments).output() => output.expect("start pgbench"),
                () = self.stop.cancelled() => return,
            };
            let text = String::from_utf8_lossy(&output.stdout);
            let count = text.lines().find_map(|line| line.strip_prefix("number of transactions actually processed: "));
            let count = count.and_then(|count| count.split('/').next()?.trim().parse().ok()).unwrap_or(0);
            self.processed.fetch_add(count, Ordering::SeqCst);
            tokio::time::sleep(RETRY).await;
        }
    }
}
