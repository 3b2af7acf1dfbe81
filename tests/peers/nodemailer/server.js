/*
 * server.js - nodemailer's smtp-server, as it comes ("no") or taught the verb BSMTP
 * ("yes"); prints its port.
 *
 * usage: node server.js yes|no FOLDER SECONDS
 *
 * So many seconds go by before it greets.
 *
 * It keeps what it takes in the folder, N.eml with the envelope in N.json.  Of the
 * domain example.net it refuses the recipient no and puts off the recipient later; it
 * takes no message with the subject "forbidden".
 */
'use strict';
const fs = require('fs');
const { SMTPServer } = require('smtp-server');
const { SMTPConnection } = require('smtp-server/lib/smtp-connection');

const [taught, folder, seconds] = process.argv.slice(2);
let count = 0;

function refusal(responseCode, text) {
	return Object.assign(new Error(text), { responseCode });
}

if (taught === 'yes') {
	SMTPConnection.prototype.handler_BSMTP = function (command, callback) {
		return this.handler_EHLO(command, callback);
	};
}

const server = new SMTPServer({
	name: 'test.example',
	disabledCommands: ['AUTH', 'STARTTLS'],
	disableReverseLookup: true,
	logger: false,
	onConnect(session, callback) {
		setTimeout(callback, seconds * 1000);
	},
	onRcptTo({ address }, session, callback) {
		callback({
			'no@example.net': refusal(550, 'no such user'),
			'later@example.net': refusal(450, 'later'),
		}[address]);
	},
	onData(stream, session, callback) {
		const parts = [];
		stream.on('data', part => parts.push(part));
		stream.on('end', () => {
			const content = Buffer.concat(parts);
			if (content.includes('\nSubject: forbidden\r\n')) {
				callback(refusal(554, 'no such subjects'));
				return;
			}
			const { mailFrom, rcptTo } = session.envelope;
			const name = `${folder}/${String(++count).padStart(6, '0')}.`;
			fs.writeFileSync(name + 'eml', content);
			fs.writeFileSync(name + 'json', JSON.stringify({
				from: mailFrom ? mailFrom.address : '',
				to: rcptTo.map(to => to.address),
			}));
			callback(null, 'taken');
		});
	},
});
// A client that goes is no reason to go too.
server.on('error', () => {});
server.listen(0, '127.0.0.1', () => console.log(server.server.address().port));
