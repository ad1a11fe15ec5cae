//! Transactions: snapshot and stream meet exactly, and every transaction arrives whole, once, and in order.

use super::case::Case;

/// Prepared before the move begins, and decided after the cut.
#[tokio::test]
async fn transactions_of_every_kind_arrive_whole() {
    let schema = "
        create table t (id int primary key, v text);
        create table log (line text);
        insert into t select i, 'old' from generate_series(1, 1000) i;";
    // The rounds are thousands apart, so that each has rows of its own.
    let script = "
@p begin; insert into t values (-10 * ROUND, 'x'); update t set v = 'prepared ROUND' where id = 5; prepare transaction 'p'
@m insert into log values ('while prepared');
insert into t select i, 'large' from generate_series(100000 * ROUND, 100000 * ROUND + 20000) i;
@p commit prepared 'p'
@m update t set v = v || 'r' where id > 100000 * ROUND + 12000;
delete from t where id > 100000 * ROUND + 17000;
@r begin; update t set v = 'never' where id > 10; prepare transaction 'r'
@r rollback prepared 'r'
@l copy log from stdin
LINES
@s do $$ begin for i in 1 .. 3000 loop begin
       insert into log values ('sub ' || i);
       if i % 2 = 0 then raise division_by_zero; end if;
   exception when division_by_zero then null; end; end loop; end $$
@a begin; update t set v = 'a first' where id = 10;
@b begin; update t set v = 'b' where id = 11; insert into t values (-10 * ROUND - 1, 'b');
@c begin; insert into log values ('c begins last and commits first'); commit
@b commit
@a update t set v = 'a last' where id = 11; commit
@e begin; commit; begin; savepoint s; insert into log values ('never'); rollback to s; commit
";
    let lines: Vec<String> = (1..=20_000).map(|n| format!("line {n}")).collect();
    let script = script.replace("LINES", &lines.join("\n"));
    let before = "
@a begin; insert into t values (-1001, 'in progress before the move'); savepoint s; update t set v = 'never' where id = 1
@b begin; update t set v = 'prepared before the move' where id = 2; prepare transaction 'commits';
@c begin; update t set v = 'never' where id = 3; prepare transaction 'rolls back'
@d begin; insert into t values (-1002, 'never')";
    let meanwhile = "
@e begin; insert into t values (-1003, 'began while the cut waited');
@a rollback to s; update t set v = 'kept' where id = 1
@f insert into t values (-1004, 'began and ended while the cut waited');
@a commit
@b commit prepared 'commits'
@c rollback prepared 'rolls back'
@d rollback
@e update t set v = 'later' where id = -1004; commit";
    let case = Case::new("transactions").schema(schema).around_the_cut(before, meanwhile).script(&script);
    case.covering(&[0, 4]).moves().await;
}
