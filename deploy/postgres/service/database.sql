-- The database of a service, for the roles in roles.sql. Run by whatever runs that file.

-- The server's own default may be an encoding that cannot store every name.
create database :"database" owner :"owner" encoding 'UTF8' template template0;

-- By default every role may connect to every database.
revoke all on database :"database" from public;
grant connect on database :"database" to :"service";

\connect :"database"

-- Applies to every table that the owner creates from now on, in any schema.
alter default privileges for role :"owner" grant select, insert, update, delete on tables to :"service";
alter default privileges for role :"owner" grant usage on sequences to :"service";
