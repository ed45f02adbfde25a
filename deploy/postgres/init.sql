-- Creates two roles and a database for each service that has one. The entry point of the Postgres
-- image runs this script with psql, as superuser, when the data volume is new. What a service gets
-- is defined in the folder service/, which `cargo xtask up` and the tests run too.
--
-- To add a service, add a paragraph for it at the end, and its name to the list of `missing`. docker-compose.yml must pass its passwords to
-- this container as WAYBILL_<NAME>_PASSWORD and WAYBILL_<NAME>_OWNER_PASSWORD.

\set ON_ERROR_STOP on

-- The variables that are missing. Only the names of services are listed here.
\set missing `for name in USER EMAIL ANALYTICS; do for password in PASSWORD OWNER_PASSWORD; do variable="WAYBILL_${name}_${password}"; [ -n "$(printenv "$variable")" ] || echo "$variable"; done; done`

-- Stops before anything is created. The volume is no longer new then, so at the next start the
-- image would not run this script again. The hint says so.
create temporary table missing as select :'missing' as variables;
do $$
declare
    missing text := (select replace(variables, E'\n', ', ') from missing);
begin
    if missing <> '' then
        raise exception 'missing password: set % in the environment of this container', missing
            using hint = 'Afterwards start with an empty volume: docker compose down --volumes';
    end if;
end
$$;

-- By default every role may connect to every database.
revoke connect on database postgres, template1 from public;

\set database waybill_user
\set service waybill_user
\set owner waybill_user_owner
\getenv password WAYBILL_USER_PASSWORD
\getenv owner_password WAYBILL_USER_OWNER_PASSWORD
\ir service/roles.sql
\ir service/database.sql

\set database waybill_email
\set service waybill_email
\set owner waybill_email_owner
\getenv password WAYBILL_EMAIL_PASSWORD
\getenv owner_password WAYBILL_EMAIL_OWNER_PASSWORD
\ir service/roles.sql
\ir service/database.sql

\set database waybill_analytics
\set service waybill_analytics
\set owner waybill_analytics_owner
\getenv password WAYBILL_ANALYTICS_PASSWORD
\getenv owner_password WAYBILL_ANALYTICS_OWNER_PASSWORD
\ir service/roles.sql
\ir service/database.sql
