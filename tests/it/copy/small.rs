//! Small tables, which go over several at a time: each still arrives whole, and none suffers for another.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use pgtandem::copy::{self, Finish, Outcome};
use pgtandem::postgres::QualifiedName;
use pgtandem::schema::indexes::{Index, Missing};
use pgtandem::state::TableState;

use super::Move;
use crate::harness::{Cluster, PATIENCE, assert_same, wait_until};

/// Tables of every sort, side by side: rows in COPY's binary form and in its text form, none, many, no columns, computed ones.
const MIXED: &str = "
    create type pair as (a int, b text);
    do $$ begin
        for i in 1..60 loop
            execute format('create table t%s (id int primary key, name text)', i);
            execute format('create table u%s (id int, both_of pair, twice int generated always as (id * 2) stored)', i);
        end loop;
    end $$;
    create table bare ();
    create table computed (g int generated always as (1) stored);
    create table empty (id int primary key, at timestamptz);";

const MIXED_ROWS: &str = r"
    do $$ begin
        for i in 1..60 loop
            execute format('insert into t%s select n, repeat(md5(n::text), n %% 3) from generate_series(1, %s) n', i, i * 7 % 50);
            execute format('insert into u%s select n, row(n, ''a tab \t and a line \\n'')::pair from generate_series(1, %s) n', i, i % 4);
        end loop;
    end $$;
    insert into bare select from generate_series(1, 3);
    insert into computed default values;";

#[tokio::test]
async fn they_arrive_whole_in_few_transactions() {
    let moved = Move::new(MIXED).await;
    moved.source.execute(MIXED_ROWS).await;
    assert_eq!(moved.copy().await, Outcome::Complete);
    assert_same(&moved.source, &moved.target).await;
    for table in moved.context.store.tables().await.unwrap() {
        let count = format!("select count(*) from {}", table.name);
        assert_eq!(moved.source.query_string(&count).await, table.rows.to_string(), "{}", table.name.plain());
    }
    let transactions = "select count(distinct xmin::text) < 15 and count(*) = 123 from pgtandem.copy_table";
    assert_eq!(moved.target.query_string(transactions).await, "t");
}

/// Waits until all tables are copied but this one.
async fn all_but(moved: &Move, held: &str) {
    wait_until("all others are copied", PATIENCE, async || {
        let states = moved.states().await.into_iter();
        states.filter(|(_, state)| *state != TableState::Copied).map(|(table, _)| table).eq([held])
    })
    .await;
}

#[tokio::test]
async fn one_that_is_locked_holds_up_itself_alone() {
    let slow = [("workers", "2"), ("max_bytes_per_second", "30000")];
    let moved = Move::configured(Cluster::pair().await, MIXED, &slow).await;
    moved.source.execute(MIXED_ROWS).await;
    let (walsender, cut) = moved.first_cut().await;
    let holder = moved.source.connect().await;
    // To plan asks each table for its size, which takes the lock, too; and those without rows come last.
    let hold = async {
        wait_until("the copy is planned", PATIENCE, async || !moved.states().await.is_empty()).await;
        holder.batch_execute("begin; lock table empty in access exclusive mode").await.unwrap();
        all_but(&moved, "public.empty").await;
        holder.batch_execute("rollback").await.unwrap();
    };
    let (outcome, ()) = tokio::join!(copy::run(&moved.context, walsender, &cut), hold);
    assert_eq!(outcome.unwrap(), Outcome::Complete);
    assert_same(&moved.source, &moved.target).await;
}

#[tokio::test]
async fn one_that_is_held_on_the_target_holds_up_itself_alone() {
    let moved = Move::new(MIXED).await;
    moved.source.execute(MIXED_ROWS).await;
    let (walsender, cut) = moved.first_cut().await;
    let holder = moved.target.connect().await;
    holder.batch_execute("begin; lock table t7 in access share mode").await.unwrap();
    let hold = async {
        all_but(&moved, "public.t7").await;
        holder.batch_execute("rollback").await.unwrap();
    };
    let (outcome, ()) = tokio::join!(copy::run(&moved.context, walsender, &cut), hold);
    assert_eq!(outcome.unwrap(), Outcome::Complete);
    assert_same(&moved.source, &moved.target).await;
}

#[tokio::test]
async fn a_row_that_is_refused_is_said_with_its_table_and_nothing_of_its_neighbours_stays() {
    let moved = Move::new(MIXED).await;
    moved.source.execute(MIXED_ROWS).await;
    moved.target.execute("alter table t7 add constraint never check (id < 3)").await;
    let (walsender, cut) = moved.first_cut().await;
    let error = copy::run(&moved.context, walsender, &cut).await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("23514"), "{error}");
    assert!(error.to_string().contains("copying the table public.t7:"), "{error}");
    // What the other workers were committing may come a moment later.
    wait_until("every table is there whole or not at all", PATIENCE, async || {
        let mut whole = true;
        for table in moved.context.store.tables().await.unwrap() {
            let rows = moved.target.query_string(&format!("select count(*) from {}", table.name)).await;
            whole &= rows == if table.state == TableState::Copied { table.rows.to_string() } else { "0".to_owned() };
        }
        whole
    })
    .await;
    moved.target.execute("alter table t7 drop constraint never").await;
    let (walsender, cut) = moved.another_cut().await;
    assert_eq!(copy::run(&moved.context, walsender, &cut).await.unwrap(), Outcome::Complete);
    assert_same(&moved.source, &moved.target).await;
}

#[tokio::test]
async fn one_that_was_truncated_after_the_cut_is_not_taken_for_empty() {
    let moved = Move::new(MIXED).await;
    moved.source.execute(MIXED_ROWS).await;
    let (walsender, cut) = moved.first_cut().await;
    moved.source.execute("truncate t7; insert into t7 values (1, 'new')").await;
    let error = copy::run(&moved.context, walsender, &cut).await.unwrap_err();
    assert_eq!(error.code(), "table_rewritten", "{error}");
    assert!(error.to_string().contains("public.t7"), "{error}");
    let (walsender, cut) = moved.another_cut().await;
    assert_eq!(copy::run(&moved.context, walsender, &cut).await.unwrap(), Outcome::Complete);
    assert_same(&moved.source, &moved.target).await;
}

#[tokio::test]
async fn rows_of_someone_else_among_them_are_not_removed() {
    let moved = Move::new(MIXED).await;
    moved.source.execute(MIXED_ROWS).await;
    moved.target.execute("insert into t7 values (1000, 'theirs')").await;
    let (walsender, cut) = moved.first_cut().await;
    let error = copy::run(&moved.context, walsender, &cut).await.unwrap_err();
    assert_eq!(error.code(), "target_table_not_empty", "{error}");
    assert!(error.to_string().contains("public.t7"), "{error}");
    assert_eq!(moved.target.query_string("select string_agg(name, ' ') from t7").await, "theirs");
}

/// What every t needs, one of them with a name that is taken.
fn missing() -> HashMap<QualifiedName, Missing> {
    let of = |i: u32| {
        let table = QualifiedName::new("public", format!("t{i}"));
        let index = |name: String, create: String| Index {
            name: QualifiedName::new("public", name),
            create: Some(create.clone()),
            key: None,
            at_once: Some(create),
        };
        let name = if i == 7 { "empty".to_owned() } else { format!("t{i}_name") };
        let indexes = vec![
            index(name.clone(), format!("create index {name} on {table} (name)")),
            index(format!("t{i}_both"), format!("create index t{i}_both on {table} (name, id)")),
        ];
        (table, Missing { indexes, analyze: true, bytes: 0 })
    };
    (1..=60).map(of).collect()
}

#[tokio::test]
async fn an_index_that_is_refused_does_not_prevent_those_of_others() {
    let mut moved = Move::new(MIXED).await;
    moved.source.execute(MIXED_ROWS).await;
    let two = NonZeroUsize::new(2).unwrap();
    let finish = Arc::new(Finish::new(&moved.context.target, two, missing()));
    moved.context.finish = Arc::clone(&finish);
    assert_eq!(moved.copy().await, Outcome::Complete);
    assert_same(&moved.source, &moved.target).await;
    assert_eq!(finish.rest().await.len(), 59);
    assert!(finish.has_put_off());
    let complete = "select string_agg(i::text, ' ') from generate_series(1, 60) i
                    where to_regclass('t' || i || '_both') is null or to_regclass('t' || i || '_name') is null
                       or (select reltuples < 0 from pg_class where oid = to_regclass('t' || i))";
    assert_eq!(moved.target.query_string(complete).await, "7");
}
