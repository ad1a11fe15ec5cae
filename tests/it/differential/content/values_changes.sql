-- One round of changes over values.sql; ROUND is a number above zero.

SET datestyle = 'ISO, YMD';
SET intervalstyle = 'postgres';
SET timezone = 'UTC';
SET lc_monetary = 'C';
SET xmloption = content;
SET search_path = '';
SET statement_timeout = 0;

SELECT v.fill('v.every_type', ROUND * 100);
SELECT v.fill('v.loose', ROUND * 100);
SELECT v.fill('v.loose', ROUND * 100);
SELECT v.rotate('v.every_type');
UPDATE v.every_type SET c_text = c_text || 'x' WHERE id = 3;
DELETE FROM v.every_type WHERE id = ROUND * 100 + 5;
UPDATE v.every_type SET id = id + 20 WHERE id = ROUND * 100 + 6;
-- Of rows that look the same one is touched, of each pair.
UPDATE v.loose SET c_int4 = ROUND WHERE ctid IN (SELECT min(ctid) FROM v.loose GROUP BY id HAVING count(*) > 1);
DELETE FROM v.loose WHERE ctid IN (SELECT max(ctid) FROM v.loose WHERE id = ROUND * 100 + 3);

SELECT v.touch_keys('UPDATE %s SET n = n + 1');
SELECT v.touch_keys('UPDATE %s SET t = ''x'', n = n + 1 WHERE k = (SELECT k FROM %1$s ORDER BY k LIMIT 1)');
SELECT v.touch_keys('DELETE FROM %s WHERE k = (SELECT k FROM %1$s ORDER BY k DESC LIMIT 1) AND (SELECT count(*) > 1 FROM %1$s)');
SELECT v.touch_keys('WITH gone AS (DELETE FROM %s WHERE k = (SELECT k FROM %1$s ORDER BY k LIMIT 1) RETURNING k) INSERT INTO %1$s SELECT k, ROUND FROM gone ON CONFLICT DO NOTHING');
